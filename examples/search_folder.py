"""Search a folder of pictures with a description.

    python examples/search_folder.py demo/scenes "A woman in a red coat walks a black dog, and it is snowing."

Pictures are embedded only once: later runs reuse the index folder and add only new pictures.
"""

import argparse

import finelip_fast


def main() -> None:
    parser = argparse.ArgumentParser(description="Search a folder of pictures with a description.")
    parser.add_argument("folder", help="folder of pictures, searched with its subfolders")
    parser.add_argument("text", help="description of the picture to find")
    parser.add_argument("--checkpoint", help="folder, file or name of a checkpoint (default: the bundled model)")
    parser.add_argument("--index", default="finelip-index", help="folder of the index (default: finelip-index)")
    parser.add_argument("-k", type=int, default=5, help="number of hits (default: 5)")
    options = parser.parse_args()

    retriever = finelip_fast.Retriever(options.checkpoint, index=options.index)
    report = retriever.add_images(options.folder, existing="skip")
    for path, reason in report.skipped:
        print(f"skipped {path!r}: {reason}")
    for rank, hit in enumerate(retriever.search(options.text, k=options.k), start=1):
        print(f"{rank:2}  {hit.score:.3f}  {hit.id!r}")


if __name__ == "__main__":
    main()
