"""`srl-rlvr base build`: a small base model of our own, in minutes."""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import Any


def add_parser(commands: Any) -> argparse.ArgumentParser:
    parser = commands.add_parser(
        "base",
        help="make a small base model, pretrained on single moves",
        description="`base build` pretrains a Llama of 4 million parameters on single moves of generated families,\n"
        "never on solutions of several steps, so that training has to teach how to chain them.\n"
        "With --think it learns to think before each move: how the move is worked out, which experts do not write.\n"
        "With --vision DATA it draws a small vision tower in front of a small Llama, which knows nothing yet; the\n"
        "tokenizer is of DATA's texts. With --epochs the tower has learned to tell DATA's images apart.",
        epilog="examples:\n  srl-rlvr base build --out out/base\n"
        "  srl-rlvr train RUN.toml --set model.base=out/base\n"
        "  srl-rlvr base build --think --family basic_arithmetic --updates 1000 --out out/thinking-base\n"
        "  srl-rlvr base build --vision ../shared/data/clothing --out out/vision",
    )
    parser.add_argument("action", choices=["build"])
    parser.add_argument("--out", metavar="DIR", type=Path, default=Path("out/base"), help="folder of the model")
    parser.add_argument(
        "--family",
        metavar="NAME",
        action="append",
        dest="families",
        help="a family whose moves it learns; repeatable (default: number_filtering, number_sorting, word_sorting; "
        "with --think basic_arithmetic, rewritten_sums, leg_counting)",
    )
    parser.add_argument("--think", action="store_true", help="learn a thought before each move")
    parser.add_argument(
        "--vision", metavar="DATA", type=Path, action="append", help="files or folders of images with questions"
    )
    parser.add_argument("--image-size", metavar="N", type=int, default=64, help="pixels a side (default: 64)")
    parser.add_argument("--patch", metavar="N", type=int, default=8, help="pixels a side of its parts (default: 8)")
    parser.add_argument(
        "--epochs", metavar="N", type=int, default=0, help="times that the tower sees each image before (default: 0)"
    )
    parser.add_argument("--updates", metavar="N", type=int, default=2400, help="of 32 texts each (default: 2400)")
    parser.add_argument("--problems", metavar="N", type=int, default=10_000, help="of each family (default: 10000)")
    parser.add_argument("--seed", metavar="N", type=int, default=0)
    return parser


def run(options: argparse.Namespace) -> int:
    from srl_rlvr import small_base
    from srl_rlvr.errors import InputError

    for flag, least in (("updates", 1), ("problems", 1), ("image_size", 1), ("patch", 1), ("epochs", 0)):
        if getattr(options, flag) < least:
            raise InputError(f"--{flag.replace('_', '-')} is {getattr(options, flag)}; it should be {least} or more")
    if options.epochs and not options.vision:
        raise InputError("--epochs is for a tower: name its images by --vision")
    if options.vision and (options.think or options.families):
        raise InputError("--vision draws a base that knows nothing yet: leave out --think and --family")
    if options.out.exists():
        raise InputError(f"{options.out} is there already; name another folder by --out")
    if options.vision:
        _build_vision(options)
        return 0
    began = time.monotonic()

    def observe(update: int, metrics: dict[str, float]) -> None:
        if (update + 1) % max(1, options.updates // 20) == 0:
            print(f"update {update + 1:>5} of {options.updates}   loss {metrics['loss']:.3f}   "
                  f"{time.monotonic() - began:.0f} s", flush=True)  # fmt: skip

    default = small_base.THINKING_FAMILIES if options.think else small_base.FAMILIES
    small_base.build(
        options.out,
        families={name: default.get(name, {}) for name in options.families or default},
        think=options.think,
        problems=options.problems,
        seed=options.seed,
        updates=options.updates,
        observe=observe,
    )
    print(f"model   {options.out}")
    return 0


def _build_vision(options: argparse.Namespace) -> None:
    from srl_rlvr import vision_base
    from srl_rlvr.model_types import multimodal_vision

    vision_base.build(
        options.out,
        texts=[multimodal_vision.TYPE.instruction, *vision_base.texts_of(options.vision)],
        image_size=options.image_size,
        patch=options.patch,
        seed=options.seed,
        images=vision_base.images_of(options.vision) if options.epochs else (),
        epochs=options.epochs,
        observe=lambda epoch, loss: print(f"epoch {epoch:>3} of {options.epochs}   loss {loss:.3f}", flush=True),
    )
    print(f"model   {options.out}")
