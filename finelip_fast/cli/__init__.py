"""The ``finelip`` command; its exit codes are those of :mod:`finelip_fast._command_line`."""

from __future__ import annotations

import argparse
import json
import re
import shlex
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn

from finelip_fast._command_line import run_command
from finelip_fast._terminal import paragraph, printable, printable_lines
from finelip_fast.cli.evaluate import EVAL_COMMANDS
from finelip_fast.cli.evaluate import add_commands as add_eval
from finelip_fast.cli.explain import add_command as add_explain
from finelip_fast.cli.index import INDEX_COMMANDS, add_commands
from finelip_fast.cli.study import add_command as add_study
from finelip_fast.errors import InputError, KernelError, StoreError

_DEFAULT_INDEX = "finelip-index"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code."""
    return run_command(lambda: _run(list(sys.argv[1:] if arguments is None else arguments)))


def _run(arguments: list[str]) -> int | None:
    for argument in arguments:  # a system passes no others, but a caller may
        if "\0" in argument or re.search("[\ud800-\udc7f\udd00-\udfff]", argument):
            raise InputError(f"expected arguments that can be names of files, got {argument!r:.80}")
    if arguments[:1] == ["train"]:  # its options are the training configuration's own
        from finelip_fast.training.train import main as train

        return train(arguments[1:])
    if arguments[:1] == ["export"]:
        return _export(arguments[1:])
    if arguments[:2] == ["study", "ablation"]:  # trains, too
        from finelip_fast.studies.ablation.command import main as ablation

        return ablation(arguments[2:])
    parser = _parser()
    if " ".join(arguments[:2]) in (*INDEX_COMMANDS, *EVAL_COMMANDS):
        arguments = [" ".join(arguments[:2]), *arguments[2:]]
    options = parser.parse_args(arguments)
    options.arguments = arguments
    options.write = []
    result = options.command(options)
    if options.json:
        print(json.dumps(result.to_dict() if hasattr(result, "to_dict") else result, default=vars))
    else:
        print(_text(result))
    # After the result has been told: a file that cannot be written does not take it along.
    for write in options.write:
        write()
    return None


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        super().error(paragraph(message))  # it quotes arguments, which a shell may have taken from the names of files


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="finelip",
        description="Search pictures with long descriptions.",
        epilog="Start with: finelip demo. Then: finelip index PHOTOS --checkpoint CKPT; finelip search 'a long description'.",
    )
    common = _Parser(add_help=False)
    common.add_argument("--json", action="store_true", help="print one JSON value instead of text")
    common.add_argument("--quiet", action="store_true", help="no progress bars")
    model = argparse.ArgumentParser(add_help=False)
    model.add_argument(
        "--checkpoint", help="folder, file, open_clip:MODEL/WEIGHTS or hub name; default: the bundled one"
    )
    model.add_argument("--engine", default="auto", help="auto (default), torch, onnx or trt")
    model.add_argument("--precision", help="of exported files: fp32, fp16, bf16 or int8; default: the fastest there")
    model.add_argument("--device", help="cpu or cuda; default: a GPU if there is one")
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")

    def add(name: str, run: Callable[[argparse.Namespace], Any], text: str, *parents: Any) -> argparse.ArgumentParser:
        command = commands.add_parser(name, help=text, description=text, parents=[common, *parents])
        command.set_defaults(command=run)
        return command

    demo = add("demo", _demo, "Draw scenes, search them with the bundled model, write an HTML page.")
    demo.add_argument("--out", default="demo", help="folder for pictures, index and page (default: demo)")
    demo.add_argument("--scenes", type=int, default=400, help="how many scenes (default: 400)")

    place = argparse.ArgumentParser(add_help=False)
    place.add_argument("--index", default=_DEFAULT_INDEX, help=f"folder of the index (default: {_DEFAULT_INDEX})")

    index = add(
        "index", _index, "Add the pictures of a folder to an index; run again, it adds what is new.", place, model
    )
    index.add_argument("folder", help="folder of pictures, searched with its subfolders (./check is one named check)")
    index.add_argument("--batch-size", type=int, default=64, help="pictures at once (default: 64)")
    index.add_argument("--dtype", help="how a new index keeps embeddings: float16 (default), or int8, half the size")
    add_commands(add, place, model)

    search = add("search", _search, "Search an index with a description or a picture.", place, model)
    search.add_argument("text", nargs="?", help="the description")
    search.add_argument("--image", help="a picture to search with, instead of a text")
    search.add_argument("-k", type=int, default=10, help="how many hits (default: 10)")
    search.add_argument("--alpha", type=float, help="weight of the global score (default: the checkpoint's)")
    search.add_argument("--mode", default="auto", help="auto (default), exact, exact-int8 or two-stage")
    search.add_argument("--where", help="only items whose metadata fit: \"camera = 'front' and year >= 2024\"")
    search.add_argument("--verify", action="store_true", help="first compare the whole index with its checksums")

    add_explain(add, model)

    add_eval(add, model)

    add_study(add, model)

    commands.add_parser("train", help="Train a checkpoint; see finelip train --help.", add_help=False)

    commands.add_parser(
        "export",
        help="Write ONNX or TensorRT files beside a checkpoint; see finelip export onnx --help.",
        add_help=False,
    )

    convert = add("convert", _convert, "Turn a CLIP, Long-CLIP or FineLIP checkpoint into a folder of ours.")
    convert.add_argument("source", help="file, folder, open_clip:MODEL/WEIGHTS or hub name")
    convert.add_argument("out", help="folder to write")
    convert.add_argument(
        "--context-length", type=int, help="longest caption in tokens (default: the checkpoint's, or 256)"
    )
    convert.add_argument("--half", action="store_true", help="store float16: half the size")

    tune = add(
        "tune", _tune, "Find the fastest launch settings of the kernels on this GPU and keep them; some minutes."
    )
    tune.add_argument(
        "--operations", nargs="+", metavar="NAME", help="clim, clim_gradient, atrm, atrm_gradient (default: all)"
    )
    tune.add_argument("--seconds", type=float, help="start no new case after so long; run again, it goes on")
    tune.add_argument("--again", action="store_true", help="tune what was tuned before, too")
    tune.add_argument("--out", type=Path, help="table to write (default: this user's, which every later run reads)")

    info = add("info", _info, "Versions, devices, and which kernels and engines can run here; or of what is named.")
    info.add_argument("checkpoint", nargs="?", help="with --verify: folder, file or name (default: the bundled one)")
    info.add_argument("--index", help="folder of an index: what it holds, and what of it is verified when")
    info.add_argument(
        "--verify", action="store_true", help="compare files with what was recorded when they were written"
    )
    return parser


def _export(arguments: list[str]) -> int:
    """``finelip export onnx`` and ``finelip export trt``: the exporters' own command lines."""
    parser = argparse.ArgumentParser(prog="finelip export", description="Write encoders for another runtime, proven.")
    parser.add_argument("runtime", choices=("onnx", "trt"), help="ONNX Runtime or TensorRT")
    runtime = parser.parse_args(arguments[:1]).runtime
    if runtime == "onnx":
        from finelip_fast.export.to_onnx import main as export
    else:
        from finelip_fast.export.to_trt import main as export
    return export(arguments[1:], prog=f"finelip export {runtime}")


def _demo(options: argparse.Namespace) -> Any:
    from finelip_fast.demo import run_demo

    return run_demo(options.out, scenes=options.scenes, progress=not options.quiet)


def _index(options: argparse.Namespace) -> Any:
    from finelip_fast.preprocess import walk_folder

    walk_folder(options.folder)  # one that is not there is an error before a model is loaded
    return _retriever(options).add_folder(options.folder, batch_size=options.batch_size, progress=not options.quiet)


def _search(options: argparse.Namespace) -> Any:
    from finelip_fast.index import stored_source

    if (options.text is None) == (options.image is None):
        raise InputError("expected either a description or --image FILE")
    if stored_source(options.index) is None:
        raise StoreError(
            f"there is no index at {options.index}: make one with finelip index FOLDER --index {options.index}"
        )
    hits = _retriever(options).search(
        options.text, image=options.image, k=options.k, mode=options.mode, where=options.where
    )
    return [vars(hit) for hit in hits]


def _retriever(options: argparse.Namespace) -> Any:
    from finelip_fast.known_checkpoints import checkpoint_of
    from finelip_fast.retriever import Retriever

    return Retriever(
        options.checkpoint or checkpoint_of(options.index) or None,
        engine=options.engine,
        precision=options.precision,
        device=options.device,
        index=options.index,
        alpha=getattr(options, "alpha", None),
        dtype=getattr(options, "dtype", None),
        verify=getattr(options, "verify", False),
    )


def _convert(options: argparse.Namespace) -> Any:
    import torch

    from finelip_fast.checkpoint import convert

    dtype = torch.float16 if options.half else None
    return convert(options.source, options.out, context_length=options.context_length, dtype=dtype)


def _tune(options: argparse.Namespace) -> Any:
    from finelip_fast.kernels import describe

    implementation, reason = describe()
    if implementation != "triton":
        raise KernelError(
            f"expected a GPU that runs the fused kernels, but {reason}: tune on the machine that searches"
        )
    from finelip_fast.kernels import tune

    cases = tune.cases_for(options.operations or tune.OPERATIONS)
    found = tune.tune(cases, again=options.again, seconds=options.seconds, out=options.out, progress=not options.quiet)
    return {
        case.name: f"{case.speedup:.2f}x the default settings; {case.failed} candidates were out" for case in found
    } or "nothing to tune: --again tunes what was tuned before"


def _info(options: argparse.Namespace) -> Any:
    from finelip_fast.info import checkpoint_info, index_info, info

    if options.checkpoint is not None and (options.index is not None or not options.verify):
        raise InputError(
            f"expected a checkpoint with --verify and without --index: finelip info {shlex.quote(options.checkpoint)} --verify"
        )
    if options.index is not None:
        return index_info(options.index, verify=options.verify)
    return checkpoint_info(options.checkpoint) if options.verify else info()


def _text(result: Any) -> str:
    """What a person reads: hits as lines, dictionaries as indented names, everything else as it prints itself."""
    if isinstance(result, list):
        return "\n".join(
            f"{rank:3}  {hit['score']:.4f}  (global {hit['global_score']:.4f}, fine {hit['fine_score']:.4f})  "
            f"{printable(hit['id'])}"
            for rank, hit in enumerate(result, start=1)
        ) or "the index is empty"  # fmt: skip
    if isinstance(result, dict):
        return "\n".join(_lines(result))
    return printable_lines(result)


def _lines(values: dict[str, Any], indent: str = "") -> list[str]:
    lines = []
    for name, value in values.items():
        if isinstance(value, dict):
            lines += [f"{indent}{printable(name)}:", *_lines(value, indent + "  ")]
        else:
            lines.append(f"{indent}{printable(name)}: {printable(value)}")
    return lines
