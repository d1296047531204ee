"""Networks in which samples see each other."""

import torch
from torch import nn

B = 5


def convolutions(norm=nn.BatchNorm2d):
    return nn.Sequential(
        nn.Conv2d(3, 4, 3),
        norm(4),
        nn.ReLU(),
        nn.Conv2d(4, 4, 3, bias=False),
        norm(4),
        nn.Tanh(),
        nn.Flatten(),
        nn.Linear(16, 4),
        nn.BatchNorm1d(4),
        nn.Tanh(),
        nn.Linear(4, 3),
    )


def normless():
    return nn.Sequential(nn.Linear(5, 4), nn.Tanh(), nn.LayerNorm(4), nn.Linear(4, 4, bias=False), nn.Tanh())


def tied():
    net = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Tanh(), nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Tanh())
    net[3].weight = net[0].weight
    return nn.Sequential(*net, net[0])


def temporal():
    return nn.Sequential(nn.Conv1d(3, 4, 2), nn.BatchNorm1d(4), nn.Tanh(), nn.Conv1d(4, 2, 2), nn.BatchNorm1d(2))


NETS = {
    "convolutions": (convolutions, (3, 6, 6)),
    "no norm over the batch": (normless, (5,)),
    "tied and reused": (tied, (4,)),
    "one axis": (temporal, (3, 5)),
}


def fresh(kind):
    torch.manual_seed(0)
    make, shape = NETS[kind]
    net = make().double()
    for parameter in net.parameters():
        nn.init.normal_(parameter, 0.3, 0.5)
    return net, torch.randn(B, *shape).double()
