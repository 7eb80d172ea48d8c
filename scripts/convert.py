"""Turn Meta's or llama2.c's weights into a model folder (config.json, safetensors, tokenizer).

    python scripts/convert.py SOURCE TARGET [--tokenizer PATH] [--dtype bfloat16]

SOURCE is a folder with params.json and consolidated.00.pth, ..., or a llama2.c .bin file (version 0 or 1).
"""

import argparse
import sys
from pathlib import Path

import torch

from srlm_fast.convert import convert
from srlm_fast.errors import UserError


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", type=Path)
    parser.add_argument("target", type=Path)
    parser.add_argument("--tokenizer", type=Path, help="its file or folder (default: tokenizer.model near SOURCE)")
    parser.add_argument(
        "--dtype", choices=["float32", "bfloat16", "float16"], help="of the tensors (default: the source's)"
    )
    parser.add_argument("--max-position-embeddings", type=int, help="longest context (default: the release's)")
    parser.add_argument("--max-shard-gb", type=float, default=5.0, help="size of a file in GB (default: 5)")
    arguments = parser.parse_args()
    try:
        config = convert(
            arguments.source,
            arguments.target,
            tokenizer=arguments.tokenizer,
            dtype=getattr(torch, arguments.dtype) if arguments.dtype else None,
            max_position_embeddings=arguments.max_position_embeddings,
            max_shard_bytes=int(arguments.max_shard_gb * 1e9),
        )
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"{arguments.target}: {config}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
