"""Ask a server many things at once, without PyTorch.

    finelip serve --index finelip-index
    printf 'a red tram\\na snowy street at night\\n' | python examples/ask_a_server.py http://127.0.0.1:8000

Each input line is a query, and each output line contains its hits as JSON, in the same order. The queries share
batches on the server, so many take little longer than one.
"""

import argparse
import asyncio
import json
import sys
from dataclasses import asdict

import finelip_fast

AT_ONCE = 32  # queries; more would only queue on the server


async def main() -> None:
    parser = argparse.ArgumentParser(description="Answer queries, a line each, by a server.")
    parser.add_argument("url", help="address of the server; its key is taken from FINELIP_API_KEY")
    parser.add_argument("-k", type=int, default=5, help="number of hits (default: 5)")
    options = parser.parse_args()

    turns = asyncio.Semaphore(AT_ONCE)
    async with finelip_fast.AsyncClient(options.url) as client:

        async def answer(query: str) -> str:
            async with turns:
                hits = await client.search(query, k=options.k)
            return json.dumps({"query": query, "hits": [asdict(hit) for hit in hits]})

        queries = [line.strip() for line in sys.stdin if line.strip()]
        for line in await asyncio.gather(*map(answer, queries)):
            print(line)


if __name__ == "__main__":
    asyncio.run(main())
