"""Trains a network of PyTorch on points of the plane, as on one processor. torch_gossip.py is the same over MPI.

python examples/torch_plain.py
"""

import torch
import torch.nn.functional as F  # noqa: N812
from torch.utils import data

torch.manual_seed(0)
x = torch.rand(4000, 2) * 2 - 1
y = (x.square().sum(dim=1) < 0.6).long()  # inside a circle?
train_set = data.TensorDataset(x[:3000], y[:3000])

model = torch.nn.Sequential(torch.nn.Linear(2, 64), torch.nn.ReLU(), torch.nn.Linear(64, 2))
optimizer = torch.optim.Adam(model.parameters(), 0.01)
loader = data.DataLoader(train_set, batch_size=60, shuffle=True)
for _ in range(10):
    for a, b in loader:
        optimizer.zero_grad()
        loss = F.cross_entropy(model(a), b)
        loss.backward()
        optimizer.step()
right = model(x[3000:]).argmax(dim=1) == y[3000:]
print(f"test accuracy {right.double().mean():.1%}", flush=True)
