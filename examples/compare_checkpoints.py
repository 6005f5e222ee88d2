"""Compare two checkpoints on the same pairs of pictures and captions.

    python examples/compare_checkpoints.py longclip-B.pt my-model --data urban1k:FOLDER

Each checkpoint searches for the right picture for each caption and the right caption for each picture. The table shows the
recall of both and how probable the difference would be by chance.
"""

import argparse
import tempfile
from pathlib import Path

from finelip_fast.datasets import open_dataset
from finelip_fast.engines import open_engine
from finelip_fast.evaluation import compare, evaluate


def main() -> None:
    parser = argparse.ArgumentParser(description="Compare two checkpoints on the same pairs of pictures and captions.")
    parser.add_argument("baseline", help="folder, file or name of the checkpoint to compare with")
    parser.add_argument("candidate", help="folder, file or name of the checkpoint to judge")
    parser.add_argument("--data", default="scenes:test:200", help="pairs, as finelip eval takes them")
    options = parser.parse_args()

    with tempfile.TemporaryDirectory() as folder:
        results = []
        for role in ("baseline", "candidate"):
            engine = open_engine("torch", getattr(options, role))
            pairs = open_dataset(options.data, image_size=engine.config.image_size)
            results.append(Path(folder) / f"{role}.json")
            evaluate(engine, pairs, data=options.data).save(results[-1])
        print(compare(results))


if __name__ == "__main__":
    main()
