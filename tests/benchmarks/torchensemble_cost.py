"""The same measurements for TorchEnsemble's snapshot classifier in PyTorch.

    pip install torch torchensemble
    python tests/benchmarks/torchensemble_cost.py

Compares its training with a plain PyTorch loop of as many epochs, and its prediction with six
members with that of one model. These ratios within PyTorch can be compared with those of
`training_cost.py` and `prediction_cost.py` within Keras. Needs neither this package nor TensorFlow.
"""

import argparse
import logging
import tempfile

import torch
import torchensemble

try:
    from benchmarks.timing import ratios, show
except ImportError:
    from timing import ratios, show

NO_LIMIT = float("nan")


def net(width):
    hidden = [torch.nn.Linear(64, width), torch.nn.ReLU()]
    hidden += [torch.nn.Linear(width, width), torch.nn.ReLU()]
    return torch.nn.Sequential(*hidden, torch.nn.Linear(width, 10))


def plain_fit(width, batches, epochs):
    model = net(width)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    loss = torch.nn.CrossEntropyLoss()
    for _ in range(epochs):
        for x, y in batches:
            optimizer.zero_grad()
            loss(model(x), y).backward()
            optimizer.step()
    return model


def snapshots(width, batches, epochs, members, folder):
    ensemble = torchensemble.SnapshotEnsembleClassifier(
        estimator=net(width), n_estimators=members, cuda=False
    )
    ensemble.set_criterion(torch.nn.CrossEntropyLoss())
    ensemble.set_optimizer("Adam", lr=1e-3)
    ensemble.fit(batches, epochs=epochs, log_interval=10**9, save_dir=folder)
    return ensemble


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--rows", type=int, default=20_000)
    parser.add_argument("--width", type=int, default=512)
    parser.add_argument("--members", type=int, default=6)
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args(argv)
    logging.getLogger().setLevel(logging.ERROR)
    torch.manual_seed(0)
    x, y = torch.randn(args.rows, 64), torch.randint(0, 10, (args.rows,))
    data = torch.utils.data.TensorDataset(x, y)
    batches = torch.utils.data.DataLoader(data, batch_size=128, shuffle=True)
    few = torch.utils.data.DataLoader(data, batch_size=32)
    rest = (batches, args.members)
    with tempfile.TemporaryDirectory() as folder:
        times, fitting = ratios(
            {
                "plain": lambda: plain_fit(args.width, *rest),
                "ensemble": lambda: snapshots(args.width, *rest, args.members, folder),
            },
            args.rounds,
        )
        ensemble = snapshots(64, *rest, args.members, folder).eval()
    model = plain_fit(64, *rest).eval()

    def predict(one):
        with torch.no_grad():
            return torch.cat([one(part) for part, _ in few])

    _, predicting = ratios(
        {"one": lambda: predict(model), "ensemble": lambda: predict(ensemble)}, args.rounds
    )
    print(f"{times['plain'] / args.members:.2f} s an epoch, medians of {args.rounds} rounds\n")
    return show(
        [
            ("TorchEnsemble: fit", "a plain loop", fitting("ensemble", "plain"), NO_LIMIT),
            (
                f"TorchEnsemble: predict, {args.members} members",
                "one model",
                predicting("ensemble", "one"),
                NO_LIMIT,
            ),
        ]
    )


if __name__ == "__main__":
    main()
