"""Small shards of image-text pairs, whole and damaged, and what comes of them."""

import io
import json
import tarfile

import lightning.pytorch as pl
import torch
from PIL import Image

from lightning_mimic.data.image_text import ImageTextDataModule
from lightning_mimic.files import TemporaryFolder

SIZE = 4
SIZES = (7, 3, 9, 5, 2)


def encoded(image, kind="PNG", **options):
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def picture_of(number):
    """A picture whose colour is its number."""
    return Image.new("RGB", (SIZE, SIZE), (number % 256, number // 256, 7))


def uid(number):
    return f"{number:032x}"


def pair(number, **changes):
    """Files of a pair by suffix; a change to ``None`` leaves one out."""
    key = f"{number:09d}"
    description = {"uid": uid(number), "key": key, "caption": f"number {number}"}
    files = {"png": encoded(picture_of(number)), "txt": f"number {number}".encode()}
    files["json"] = json.dumps(description).encode()
    return [(f"{key}.{suffix}", data) for suffix, data in (files | changes).items() if data is not None]


def write(path, files):
    """A tar of (name, content), in this order."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for name, data in files:
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    return path


def write_shards(folder, *sizes, sized=False):
    """Shards of so many pairs each, numbered through; their paths."""
    first, paths = 0, []
    for place, size in enumerate(sizes):
        files = [file for number in range(first, first + size) for file in pair(number)]
        paths.append(write(folder / f"{place:08d}.tar", files))
        first += size
    if sized:
        counts = {path.name: size for path, size in zip(paths, sizes, strict=True)}
        (folder / "sizes.json").write_text(json.dumps(counts))
    return paths


def transform(image):
    """The number that the colour stands for, three times; the whole image must be of one colour."""
    values = torch.tensor(list(image.get_flattened_data()))
    assert (values == values[0]).all()
    return values[0].float()


def tokenizer(captions):
    """The number in the caption, -1 if there is none, and a token more."""
    last = [caption.split()[-1] for caption in captions]
    return torch.tensor([[int(word) if word.isdigit() else -1, 0] for word in last])


def module(shards, **options):
    shards = shards if isinstance(shards, str) else [str(shard) for shard in shards]
    made = ImageTextDataModule(shards, transform, tokenizer, **({"batch_size": 4, "shuffle": 0} | options))
    made.setup("fit")
    return made


def numbers(batch):
    """The numbers of a batch's pairs, told by ids, captions and images alike."""
    images, texts = batch
    assert images.dtype == torch.float32
    assert texts.dtype == torch.int64
    found = [int(each, 16) for each in batch.ids]
    assert texts[:, 0].tolist() == found
    assert (images[:, 0] + 256 * images[:, 1]).tolist() == found
    return found


def batches_of(loader):
    return [numbers(batch) for batch in loader]


def flat(batches):
    return [number for batch in batches for number in batch]


class Ranks:
    """Stands in for a trainer of several ranks, as far as a data module looks at it."""

    training = False
    is_last_batch = False

    def __init__(self, rank, world):
        self.global_rank, self.world_size = rank, world
        self.is_global_zero = rank == 0
        self.strategy = self.fit_loop = self
        self.epoch_progress = self.current = self
        self.processed = 0
        self.folder = TemporaryFolder("ranks-")

    def broadcast(self, given):
        run, folder = given
        return run, self.folder.path if folder is None else folder  # the first rank would have made one

    def barrier(self, name):
        pass


def of_rank(shards, rank, world, **options):
    made = ImageTextDataModule(
        [str(shard) for shard in shards], transform, tokenizer, **({"batch_size": 4, "shuffle": 0} | options)
    )
    made.trainer = Ranks(rank, world)
    made.setup("fit")
    return made


class Reader(pl.LightningModule):
    """Notes what it is given."""

    def __init__(self, stop_at=None):
        super().__init__()
        self.layer = torch.nn.Linear(1, 1)
        self.seen, self.validated, self.stop_at, self.steps = {}, [], stop_at, 0

    def training_step(self, batch, batch_idx):
        if self.stop_at == (self.current_epoch, batch_idx):
            raise InterruptedError
        self.seen.setdefault(self.current_epoch, []).append(numbers(batch))
        return self.layer(batch[0][:, :1]).mean() * 0

    def validation_step(self, batch, batch_idx, dataloader_idx=0):
        self.validated.append((self.current_epoch, tuple(batch[1].shape)))

    test_step = validation_step

    def configure_optimizers(self):
        optimizer = torch.optim.SGD(self.parameters(), 0.1)
        return [optimizer], [torch.optim.lr_scheduler.LambdaLR(optimizer, self.note)]

    def note(self, step):
        self.steps = step
        return 1.0


def trainer(folder, *callbacks, **options):
    options = {"max_epochs": 3, "num_sanity_val_steps": 0} | options
    return pl.Trainer(
        **options, accelerator="cpu", logger=False, enable_progress_bar=False, enable_model_summary=False,
        callbacks=list(callbacks), default_root_dir=folder, enable_checkpointing=False,
    )  # fmt: skip


def data_of(shards, **options):
    options = {"batch_size": 4, "shuffle": 5} | options
    return ImageTextDataModule([str(shard) for shard in shards], transform, tokenizer, **options)
