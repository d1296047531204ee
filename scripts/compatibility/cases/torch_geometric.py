"""PyTorch Geometric: batches of graphs, and the nodes of one graph."""

import torch
import torch.nn.functional as F
from torch_geometric.data import Batch, Data
from torch_geometric.nn import GCNConv, GINConv, global_add_pool, global_mean_pool

from scripts.compatibility.case import Case
from scripts.compatibility.modules import Trained

CLASSES, FEATURES = 3, 5


class GraphClassifier(Trained):
    def __init__(self, conv, pool) -> None:
        super().__init__()
        self.first, self.second = conv(FEATURES, 8), conv(8, 8)
        self.pool = pool
        self.head = torch.nn.Linear(8, CLASSES)

    def forward(self, batch):
        x = self.first(batch.x, batch.edge_index).relu()
        x = self.second(x, batch.edge_index).relu()
        return self.head(self.pool(x, batch.batch))

    def training_step(self, batch, batch_idx):
        loss = F.cross_entropy(self(batch), batch.y)
        self.log("loss", loss, batch_size=batch.num_graphs)
        return loss


class GraphClassifierOfSamples(GraphClassifier):
    def sample_losses(self, batch):
        return F.cross_entropy(self(batch), batch.y, reduction="none")

    def training_step(self, batch, batch_idx):
        return self.sample_losses(batch).mean()


class NodeClassifier(GraphClassifier):
    def forward(self, batch):
        x = self.first(batch.x, batch.edge_index).relu()
        return self.head(self.second(x, batch.edge_index).relu())

    def training_step(self, batch, batch_idx):
        return F.cross_entropy(self(batch)[batch.train_mask], batch.y[batch.train_mask])


def gin(features: int, hidden: int) -> GINConv:
    return GINConv(torch.nn.Sequential(torch.nn.Linear(features, hidden), torch.nn.ReLU()))


def graph(nodes: int, label: int) -> Data:
    ring = torch.arange(nodes)
    edges = torch.stack([ring, ring.roll(1)])
    return Data(
        x=torch.randn(nodes, FEATURES).double(),
        edge_index=torch.cat([edges, edges.flip(0)], 1),
        y=torch.tensor([label]),
    )


def graphs(size: int):
    drawn = [graph(nodes, label) for nodes, label in ((3, 0), (5, 1), (4, 2), (6, 0))]
    return (Batch.from_data_list(drawn[at : at + size]) for at in range(0, 4, size))


def nodes(size: int):
    """One graph, of which a few nodes are trained on."""
    drawn = graph(8, 0)
    drawn.y, drawn.train_mask = torch.arange(8) % CLASSES, torch.arange(8) < 4
    return [drawn] * 4


CASES = [
    Case(
        "graph classification, GCN, mean of the nodes",
        GraphClassifier,
        graphs,
        "head",
        fixed=GraphClassifierOfSamples,
        options={"conv": GCNConv, "pool": global_mean_pool},
    ),
    Case(
        "graph classification, GIN, sum of the nodes",
        GraphClassifier,
        graphs,
        "head",
        fixed=GraphClassifierOfSamples,
        options={"conv": gin, "pool": global_add_pool},
    ),
    Case(
        "node classification in one graph",
        NodeClassifier,
        nodes,
        "head",
        plain=False,
        options={"conv": GCNConv, "pool": None},
    ),
]
