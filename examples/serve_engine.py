"""Export a checkpoint to ONNX, and answer queries from it until there are no more.

    printf 'a red tram\\na snowy street at night\\n' | python examples/serve_engine.py my-model finelip-index

A process that stays: model and index are opened once, each line of the input is a query, each line of the output its hits as
JSON. What is added to the index meanwhile, by whichever process, is found by the next query.
"""

import argparse
import json
import sys
from dataclasses import asdict

import finelip_fast


def main() -> None:
    parser = argparse.ArgumentParser(description="Answer queries, a line each, from an exported engine.")
    parser.add_argument("checkpoint", help="folder of the checkpoint that made the index")
    parser.add_argument("index", help="folder of the index")
    parser.add_argument("--precision", default="int8", help="precision of the export (default: int8)")
    parser.add_argument("-k", type=int, default=5, help="number of hits (default: 5)")
    options = parser.parse_args()

    # build=True exports what is missing; it is proven to be the model before it is used.
    retriever = finelip_fast.Retriever(
        options.checkpoint, engine="onnx", precision=options.precision, build=True, index=options.index
    )
    print(retriever.engine, file=sys.stderr)
    for line in sys.stdin:
        if query := line.strip():
            hits = retriever.search(query, k=options.k)
            print(json.dumps({"query": query, "hits": [asdict(hit) for hit in hits]}), flush=True)


if __name__ == "__main__":
    main()
