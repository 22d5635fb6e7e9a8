"""Exercise 4: replicas that take the best one's weights, and others. mpirun -n 3 python elite.py"""

import nettorrent_mpi as nt
from nettorrent_mpi.config.sections import Layout

REPLICAS = 3
layers = [nt.Flatten(), nt.Linear(48, activation="relu"), nt.Linear(10)]
data = {"name": "digits", "validation": 0.15, "partition": "disjoint"}
found = {}
for exchange in (nt.Nothing(), nt.Elite(every_samples=4000), nt.Allreduce()):
    settings = {"optimizer": nt.Sgd(0.05, momentum=0.9), "batch_size": 16 * REPLICAS, "evaluate_every": 5}
    layout = Layout(replicas=REPLICAS)
    with nt.Trainer(layers, data, layout=layout, exchange=exchange, epochs=5, seed=3, **settings) as trainer:
        for _ in trainer.train():
            pass
        found[exchange.kind] = trainer.evaluate()
        rank = trainer.rank
if rank == 0:
    for kind, scores in found.items():
        print(f"{kind:10} test {scores.test.accuracy:.1%}, validation {scores.validation.accuracy:.1%}")
    assert found["allreduce"].test.accuracy > 0.9
