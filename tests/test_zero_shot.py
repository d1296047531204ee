"""What a CLIP knows without training: classes by their names and captions by their images, against loops by hand."""

import re

import open_clip
import pytest
import torch
import torch.nn.functional as F
from torch.utils.data import DataLoader, TensorDataset

from lightning_mimic.models import CLIP, ZeroShot, recall_at_k
from support.cases import for_each
from support.clips import SGD, TEXT, VISION, clip, losses_of, pairs
from support.toys import trainer

NAMES, TEMPLATES = ["cat", "dog", "a long-legged bird"], ["a photo of a {}.", "{}", "art of the {}!"]


def worded(**options):
    """A CLIP that reads with open_clip's own tokenizer."""
    zero_shot = ZeroShot(NAMES, TEMPLATES, open_clip.get_tokenizer("ViT-B-32", context_length=16))
    torch.manual_seed(2)
    made = open_clip.CLIP(12, VISION, TEXT | {"vocab_size": 49408, "context_length": 16}).double()
    return CLIP(made, zero_shot=zero_shot, optimizer=SGD, **options).double()


def labelled(count=40):
    images = pairs(count, seed=5).tensors[0]
    return TensorDataset(images, torch.randint(0, 3, (count,), generator=torch.Generator().manual_seed(1)))


def captioned(count=30):
    """Pairs of which some have the same caption."""
    images, _ = pairs(count, seed=6).tensors
    tokens = open_clip.get_tokenizer("ViT-B-32", context_length=16)([f"number {k % 11}" for k in range(count)])
    return TensorDataset(images, tokens)


def accuracy_by_hand(module, data):
    tokenize, right = module.zero_shot.tokenizer, 0
    with torch.no_grad():
        classes = []
        for name in NAMES:
            sentences = [
                F.normalize(module.towers.encode_text(tokenize([t.format(name)]))[0], dim=0) for t in TEMPLATES
            ]
            classes.append(F.normalize(torch.stack(sentences).mean(0), dim=0))
        for image, label in data:
            embedded = module.towers.encode_image(image[None])[0]
            right += max(range(3), key=lambda k: float(embedded @ classes[k])) == int(label)
    return right / len(data)


def recalls_by_hand(images, texts, names):
    found = {}
    for way, queries, answers in (("image_to_text", images, texts), ("text_to_image", texts, images)):
        for k in (1, 5, 10):
            hits = 0
            for own, query in enumerate(queries):
                order = sorted(range(len(answers)), key=lambda j: -float(F.cosine_similarity(query, answers[j], dim=0)))
                hits += any(names[j] == names[own] for j in order[:k])
            found[f"{way}_R@{k}"] = hits / len(queries)
    return found


@pytest.mark.parametrize("stage", ["val", "test"])
def test_labelled_images_and_pairs_are_evaluated_together(stage):
    module, images, texts = worded(), labelled(), captioned()
    loaders = [DataLoader(images, 16), DataLoader(texts, 12)]
    if stage == "test":
        loaders.reverse()
    evaluate = trainer().validate if stage == "val" else trainer().test
    figures = {}
    for part in evaluate(module, loaders, verbose=False):
        figures |= part
    with torch.no_grad():
        embedded = module.towers.encode_image(texts.tensors[0]), module.towers.encode_text(texts.tensors[1])
        parts = [texts[start : start + 12] for start in range(0, 30, 12)]
        loss = sum(len(part[0]) * float(losses_of(module, part).mean()) for part in parts) / 30
    expected = {f"{stage}/{k}": v for k, v in recalls_by_hand(*embedded, [k % 11 for k in range(30)]).items()}
    expected |= {f"{stage}/zero_shot_accuracy": accuracy_by_hand(module, images), f"{stage}/loss": loss}
    assert figures == pytest.approx(expected, rel=1e-5)
    assert 0.1 < figures[f"{stage}/zero_shot_accuracy"] < 0.9
    assert 1 / 30 < figures[f"{stage}/image_to_text_R@1"] < 1
    # Nothing stays for the next evaluation.
    again = {}
    for part in evaluate(module, loaders, verbose=False):
        again |= part
    assert again == figures


def test_classes_are_named_anew_after_training():
    module, images = worded(warmup_steps=0), labelled()
    fitted = trainer(epochs=2, num_sanity_val_steps=1)
    fitted.fit(module, DataLoader(captioned(8), 4), DataLoader(images, 16))
    found = float(fitted.callback_metrics["val/zero_shot_accuracy"])
    module.eval()
    assert found == pytest.approx(accuracy_by_hand(module, images))


def test_the_classifier_is_open_clips_own_and_of_unit_vectors():
    module = worded().eval()
    weights = module.zero_shot.weights(module)
    torch.testing.assert_close(weights.norm(dim=0), torch.ones(3).double())
    assert weights.shape == (12, 3)
    assert not weights.requires_grad


def test_labels_without_names_are_refused():
    with pytest.raises(ValueError, match="a batch has labelled images, but the model has no `zero_shot`"):
        trainer().validate(clip(), DataLoader(labelled(), 8), verbose=False)


@for_each(
    ("names", "templates", "message"),
    [
        ([], ["{}"], "`zero_shot` has 0 class names and 1 templates; give at least one of each."),
        (["cat"], [], "`zero_shot` has 1 class names and 0 templates; give at least one of each."),
        (["cat"], ["{}", "a"], "`templates`: 'a' has no placeholder for the class name; insert {}."),
    ],
)
def test_classes_without_names_or_places_for_them_are_refused(names, templates, message):
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        ZeroShot(names, templates, lambda texts: torch.zeros(len(texts), 4))


@for_each("names", [range(12), [k % 5 for k in range(12)], [0] * 12])
def test_recalls_equal_a_loop(names):
    torch.manual_seed(0)
    images, texts = torch.randn(12, 4), torch.randn(12, 4)
    names = torch.tensor(list(names))
    found = recall_at_k(3 * images, texts / 2, names[None] == names[:, None])
    assert found == pytest.approx(recalls_by_hand(images, texts, names.tolist()))


def test_recalls_beyond_what_there_is_are_left_out():
    same = torch.eye(6, dtype=torch.bool)
    found = recall_at_k(torch.randn(6, 4), torch.randn(6, 4), same)
    assert set(found) == {f"{way}_R@{k}" for way in ("image_to_text", "text_to_image") for k in (1, 5)}
    assert recall_at_k(torch.eye(6), torch.eye(6), same, [1])["image_to_text_R@1"] == 1.0
