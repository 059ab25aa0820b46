"""``pagemgr doctor``: what this machine has, which backends can run on it, and what to do about the others."""

from __future__ import annotations

import os
import platform
import shutil
import sys
from collections.abc import Iterator
from dataclasses import asdict
from importlib import metadata

import click

import pagemgr

from .checkup import BROKEN, checkup
from .output import print_json, print_table

PACKAGES = ("numpy", "torch", "triton", "transformers", "matplotlib")
COMPILERS = ("g++", "nvcc")


@click.command("doctor")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON document.")
@click.pass_context
def command(ctx: click.Context, as_json: bool) -> None:
    """What can run on this machine, and what to do about the rest.

    \b
    pagemgr doctor && pagemgr demo
    pagemgr doctor --json | jq '.findings[] | select(.verdict != "good")'

    Exit code 0 if at least one backend can run and nothing is broken, else 1.
    """
    machine, backends, findings = dict(_machine()), _backends(), list(checkup())
    if as_json:
        print_json({"machine": machine, "backends": backends, "findings": list(map(asdict, findings))})
    else:
        print_table("machine", ("what", "found"), [(name, found or "not found") for name, found in machine.items()])
        click.echo()
        rows = [(row["name"], "yes" if row["available"] else "no", row["reason"]) for row in backends]
        print_table("backends", ("name", "can run", "if not, why and what to do"), rows)
        click.echo()
        shown = [(one.name, one.verdict, one.found, one.advice) for one in findings]
        print_table("findings", ("what", "is", "found", "what to do"), shown)
    runs, broken = any(row["available"] for row in backends), any(one.verdict == BROKEN for one in findings)
    ctx.exit(0 if runs and not broken else 1)


def _machine() -> Iterator[tuple[str, str | None]]:
    yield "pagemgr", pagemgr.__version__
    yield "python", f"{platform.python_version()} ({sys.executable})"
    yield "platform", platform.platform()
    for package in PACKAGES:
        yield package, _version(package)
    for compiler in COMPILERS:
        yield compiler, shutil.which(compiler)
    yield "host memory", _host_memory()
    yield from _cuda()


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _host_memory() -> str | None:
    if "SC_AVPHYS_PAGES" not in os.sysconf_names:
        return None
    page = os.sysconf("SC_PAGE_SIZE")
    free, total = os.sysconf("SC_AVPHYS_PAGES") * page, os.sysconf("SC_PHYS_PAGES") * page
    return _of(free, total)


def _cuda() -> Iterator[tuple[str, str | None]]:
    try:
        import torch
    except (ImportError, OSError) as error:  # a library it links to may be missing
        yield "cuda", f"unknown, as torch does not load: {error}"
        return
    built = torch.version.cuda
    if not torch.cuda.is_available():
        yield "cuda", f"torch, built for CUDA {built}, finds no device" if built else "torch is built without CUDA"
        return
    yield "cuda", built
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        free, total = torch.cuda.mem_get_info(index)
        yield f"cuda:{index}", f"{properties.name}, sm_{properties.major}{properties.minor}, {_of(free, total)}"


def _of(free: int, total: int) -> str:
    return f"{free / 2**30:.1f} of {total / 2**30:.1f} GiB free"


def _backends() -> list[dict[str, str | bool]]:
    try:
        from pagemgr.backends.registry import availability
    except (ImportError, OSError) as error:
        reason = f"torch does not load, so nothing can run: {error}. Reinstall it: pip install --force-reinstall torch"
        return [{"name": "torch", "available": False, "reason": reason}]
    return [{"name": one.name, "available": one.available, "reason": one.reason} for one in availability()]
