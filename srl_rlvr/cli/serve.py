"""`srl-rlvr serve`: trained models over HTTP, behind one gateway."""

from __future__ import annotations

import argparse
import logging
import os
import signal
import threading
from pathlib import Path
from typing import Any

_KEYS = "keys.json"
_REGISTRY = "registry:"


def add_parser(commands: Any) -> argparse.ArgumentParser:
    parser = commands.add_parser(
        "serve",
        help="trained models over HTTP",
        description="Starts Ray, or joins it, deploys the models, and answers requests until Ctrl-C.",
        epilog="examples:\n  srl-rlvr serve                             every champion in the registry\n"
        "  srl-rlvr serve --model out/quickstart/model\n  srl-rlvr serve SERVE.toml\n"
        "  srl-rlvr serve --new-key phone --scope chat --days 90\n\ndocs/serving.md has every key of the file",
    )
    parser.add_argument("config", metavar="SERVE.toml", type=Path, nargs="?", help="what to serve, and to whom")
    parser.add_argument("--model", metavar="MODEL", action="append", default=[], help="a model folder; may be repeated")
    parser.add_argument("--host", help="where to listen (default: only this machine)")
    parser.add_argument("--port", type=int, help="default: 8000")
    parser.add_argument("--write-config", metavar="FILE", type=Path, help="write Ray Serve's own config file, and end")
    parser.add_argument("--new-key", metavar="NAME", help="make an API key, print it once, and end")
    parser.add_argument("--keys", metavar="FILE", type=Path, help=f"with --new-key: the file (default: {_KEYS})")
    parser.add_argument("--scope", action="append", default=[], help="with --new-key: what it may ask for; repeatable")
    parser.add_argument("--days", type=int, help="with --new-key: how long it is valid")
    parser.add_argument("--per-minute", type=int, default=0, help="with --new-key: requests a minute")
    return parser


def run(options: argparse.Namespace) -> int:
    from srl_rlvr.errors import InputError, MissingExtraError

    try:
        from serve import access, app
        from serve import config as configs
    except ImportError as error:
        if (error.name or "").startswith("serve"):
            raise
        raise MissingExtraError(error.name or "ray[serve]", "serve") from None

    if options.new_key:
        file = options.keys or Path(_KEYS)
        print(access.new_key(file, options.new_key, options.scope, options.days, options.per_minute))
        return 0
    config = configs.load(options.config) if options.config else configs.ServeConfig()
    changed = {name: getattr(options, name) for name in ("host", "port") if getattr(options, name) is not None}
    models = [*config.models, *(configs.ModelEntry(path=path) for path in options.model)]
    raw = (
        config.model_dump() | changed | {"models": [entry.model_dump() for entry in models or _champions(config.runs)]}
    )
    config = configs.check(raw, str(options.config or "serve"))
    registered = _resolve(config)
    app.settings_of(config)  # what is wrong is said before Ray starts
    if (config.address or os.environ.get("RAY_ADDRESS", "")).startswith("ray://"):
        raise InputError("the gateway joins a cluster from one of its machines (address = \"auto\"); from elsewhere: "
                         "--write-config, and Ray Serve's own 'serve deploy'")  # fmt: skip
    if options.write_config:
        import yaml

        options.write_config.write_text(yaml.safe_dump(app.applications(config), sort_keys=False))
        print(f"serve deploy {options.write_config}")
        return 0
    return _stay(config, registered)


def _champions(runs: str) -> list[Any]:
    from serve.config import ModelEntry
    from srl_rlvr.errors import InputError
    from srl_rlvr.registry import champions

    found = champions.find(Path(runs))
    if not found:
        raise InputError("nothing to serve: no model is given, and none in the registry is a champion; give --model "
                         "FOLDER, or set the alias 'champion' of a registered model in MLflow")  # fmt: skip
    return [ModelEntry(name=name, path=f"{_REGISTRY}{name}") for name in found]


def _resolve(config: Any) -> dict[str, str]:
    """Folders for names, and the names of what has none. Returns those that come from the registry, by our name."""
    from srl_rlvr.cli.session import model_cache
    from srl_rlvr.policies import base_models
    from srl_rlvr.registry import champions

    registered = {}
    for entry in config.models:
        if entry.base:
            entry.base = str(base_models.resolve(entry.base, model_cache()))
        if entry.path.startswith(_REGISTRY):
            champion = entry.path.removeprefix(_REGISTRY)
            entry.path = str(champions.find(Path(config.runs), champion)[champion])
            entry.name = entry.name or champion
            registered[entry.name] = champion
        folder = base_models.resolve(entry.path, model_cache())
        given = base_models.read_card(folder).get("name")
        entry.name = entry.name or given or (folder.parent.name if folder.name == "model" else folder.name)
        entry.path = str(folder)
    return registered


def _stay(config: Any, registered: dict[str, str]) -> int:
    import ray
    from ray import serve as ray_serve

    from actors.cluster import connect
    from serve import app, listener

    with listener.bound(config.host, config.port) as socket:  # taken by another: known before Ray starts
        server = listener.Listener(config, app.gateway_of(app.settings_of(config)))
        print("starting Ray", flush=True)
        cores = os.cpu_count() or 1
        local = connect(config.address, cores, dashboard=False)
        if local:
            app.share_cores(config.models, cores)
        asked_to_stop = threading.Event()
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, lambda *_: asked_to_stop.set())
        logging.getLogger("ray.serve").setLevel(logging.WARNING)
        watching = threading.Thread(target=_watch, args=(config, registered, asked_to_stop))
        try:
            print(f"starting {', '.join(entry.name for entry in config.models)}", flush=True)
            app.deploy(config.models)
            if not asked_to_stop.is_set():
                watching.start()
                server.run([socket])
        finally:
            asked_to_stop.set()
            if watching.ident:
                watching.join()
            if local:
                ray_serve.shutdown()
                ray.shutdown()
    return 0


def _watch(config: Any, registered: dict[str, str], asked_to_stop: threading.Event) -> None:
    """Until the end: puts new champions of the registry in the place of old ones, one at a time."""
    from serve import upgrade
    from srl_rlvr.errors import InputError
    from srl_rlvr.registry import champions

    def say(text: str) -> None:
        print(text, flush=True)

    refused: set[str] = set()  # folders that were tried and went back
    while not asked_to_stop.wait(config.upgrade.registry_every_s if registered else None):
        try:
            found = champions.find(Path(config.runs), *registered.values())
        except InputError as error:
            say(f"WARNING: {error}")
            continue
        for entry in config.models:
            path = str(found.get(registered.get(entry.name, ""), entry.path))
            if path == entry.path or path in refused:
                continue
            new = entry.model_copy(update={"path": path})
            try:
                if upgrade.upgrade(config.models, new, config.upgrade, say, asked_to_stop.is_set):
                    entry.path = path
                else:
                    refused.add(path)
            except InputError as error:
                say(f"{entry.name}: the old version stays: {error}")
                refused.add(path)
