"""`srl-rlvr serve`: trained models over HTTP, behind one gateway."""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import logging
import os
import sys
import threading
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

_TRIES = 3  # of a version whose upgrade broke off
_WATCH_ENDS_IN_S = 60.0  # it puts back what it was in the middle of
_LOCAL_WATCH_ENDS_IN_S = 2.0  # the models end with it
_KEYS = "keys.json"
_KEYS_ACTIONS = ("list", "revoke")
_REGISTRY = "registry:"


def add_parser(commands: Any) -> argparse.ArgumentParser:
    parser = commands.add_parser(
        "serve",
        help="trained models over HTTP",
        description="Starts Ray, or joins it, deploys the models, and answers requests until Ctrl-C.",
        epilog="examples:\n  srl-rlvr serve                             every champion in the registry\n"
        "  srl-rlvr serve --model out/quickstart/model\n  srl-rlvr serve SERVE.toml\n"
        "  srl-rlvr serve --new-key phone --scope chat --days 90\n"
        "  srl-rlvr serve --keys list\n"
        "  srl-rlvr serve --keys revoke phone\n\ndocs/serving.md has every key of the file",
    )
    parser.add_argument("config", metavar="SERVE.toml", type=Path, nargs="?", help="what to serve, and to whom")
    parser.add_argument("--model", metavar="MODEL", action="append", default=[], help="a model folder; may be repeated")
    parser.add_argument("--host", help="where to listen (default: only this machine)")
    parser.add_argument("--port", type=int, help="default: 8000")
    parser.add_argument("--write-config", metavar="FILE", type=Path, help="write Ray Serve's own config file, and end")
    parser.add_argument("--new-key", metavar="NAME", help="make an API key, print it once, and end")
    parser.add_argument(
        "--keys", metavar=("ACTION", "NAME"), nargs="+", help="list the keys, or revoke NAME (list | revoke NAME)"
    )
    parser.add_argument(
        "--keys-file", metavar="FILE", type=Path,
        help=f"of --new-key and --keys: the file (default: that of SERVE.toml, else {_KEYS})",
    )  # fmt: skip
    parser.add_argument("--scope", action="append", default=[], help="with --new-key: what it may ask for; repeatable")
    parser.add_argument("--days", type=int, help="with --new-key: how long it is valid")
    parser.add_argument("--per-minute", type=int, default=0, help="with --new-key: requests a minute")
    return parser


def run(options: argparse.Namespace) -> int:
    from srl_rlvr.cli import stay_on_this_machine
    from srl_rlvr.errors import InputError, MissingExtraError

    if options.new_key or options.keys or options.keys_file:
        return _keys(options)
    try:
        from serve import config as configs

        config = configs.load(options.config) if options.config else configs.ServeConfig()
        if not (config.address or os.environ.get("RAY_ADDRESS")):
            stay_on_this_machine()
        from serve import app
    except ImportError as error:
        if (error.name or "").startswith("serve"):
            raise
        raise MissingExtraError(error.name or "ray[serve]", "serve") from None

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
    from actors.cluster import check_authentication

    check_authentication()
    return _stay(config, registered)


def _keys(options: argparse.Namespace) -> int:
    """What --new-key, --keys and --keys-file ask for. The file is the one that is named, or SERVE.toml's."""
    from serve import access
    from serve import config as configs
    from srl_rlvr.errors import InputError

    asked = options.keys or []
    file = options.keys_file
    if options.new_key and len(asked) == 1 and file is None:  # --keys FILE
        if asked[0] in _KEYS_ACTIONS:
            raise InputError(f"--new-key and --keys {asked[0]} are two things: give one, or a file by --keys-file")
        file, asked = Path(asked[0]), []
    if bool(options.new_key) == bool(asked):
        raise InputError("give --new-key NAME, --keys list or --keys revoke NAME, with the file by --keys-file")
    if file is None and options.config:
        file = Path(configs.load(options.config).access.keys or _KEYS)
    file = file or Path(_KEYS)
    match asked:
        case []:
            print(access.new_key(file, options.new_key, options.scope, options.days, options.per_minute))
        case ["list"]:
            print(access.table(access.read(file)))
        case ["revoke", name]:
            access.revoke(file, name)
            print(f"{name} is revoked: gateways that read {file} refuse it from now on")
        case _:
            raise InputError(f"--keys {' '.join(asked)}: it should be 'list' or 'revoke NAME'; a file is named by "
                             "--keys-file FILE")  # fmt: skip
    return 0


def _champions(runs: str) -> list[Any]:
    from serve.config import ModelEntry
    from srl_rlvr.errors import InputError
    from srl_rlvr.registry import champions

    found = champions.find(Path(runs))
    if not found:
        raise InputError("nothing to serve: no model is given, and none in the registry is a champion; give --model "
                         "FOLDER, or set the alias 'champion' of a registered model in MLflow")  # fmt: skip
    return [ModelEntry(name=name, path=f"{_REGISTRY}{name}") for name in found]


def _resolve(config: Any) -> dict[str, Any]:
    """Folders for names, and the names of what has none. Returns the champions of those that come from the registry, by
    our name."""
    from srl_rlvr.cli.session import model_cache
    from srl_rlvr.policies import base_models
    from srl_rlvr.registry import champions

    registered = {}
    for entry in config.models:
        if entry.base:
            entry.base = str(base_models.resolve(entry.base, model_cache()))
        if entry.path.startswith(_REGISTRY):
            name = entry.path.removeprefix(_REGISTRY)
            champion = champions.find(Path(config.runs), name)[name]
            entry.path = str(champions.fetch(champion, _registry_cache()))
            entry.name = entry.name or name
            registered[entry.name] = champion
        folder = base_models.resolve(entry.path, model_cache())
        given = base_models.read_card(folder).get("name")
        entry.name = entry.name or str(given or (folder.parent.name if folder.name == "model" else folder.name))
        entry.path = str(folder)
    return registered


def _stay(config: Any, registered: dict[str, Any]) -> int:
    import ray

    from actors.cluster import connect
    from serve import app, lifecycle, listener
    from srl_rlvr.errors import RunError

    os.umask(0o077)  # what is written from here on, logs of Ray's processes included, is its owner's alone
    logging.getLogger("ray.serve").setLevel(logging.WARNING)
    logging.getLogger("uvicorn.error").addFilter(_no_cut_off_request)
    with listener.bound(config.host, config.port) as socket:  # taken by another: known before Ray starts
        server = listener.Listener(config, app.gateway_of(app.settings_of(config)))
        server.capture_signals = contextlib.nullcontext  # type: ignore[assignment]  # the lifecycle heeds them
        with lifecycle.Lifecycle() as life, contextlib.redirect_stdout(lifecycle.WithoutRaysErrors(sys.stdout)):
            _say("starting Ray")
            local = connect(config.address, os.cpu_count() or 1, dashboard=False)
            life.heed_signals()
            try:
                _prepare(config, local, life)
                watching = threading.Thread(target=_watch, args=(config, registered, life.stopping), daemon=True)
                watching.start()
                life.serve(lambda: server.run([socket]), lambda: setattr(server, "should_exit", True))
                if not life.stopping.is_set():
                    raise RunError("the gateway ended by itself; what it said before says why")
                watching.join(_LOCAL_WATCH_ENDS_IN_S if local else _WATCH_ENDS_IN_S)
            finally:
                life.stopping.set()
                life.ray_may_end()
                ray.shutdown()
    return 0


def _prepare(config: Any, local: bool, life: Any) -> None:
    """All models answer when this returns. Raises RunError naming the one that does not."""
    import ray
    from ray.exceptions import RayError

    from actors.cluster import session_folder
    from serve import app, upgrade
    from srl_rlvr.errors import RunError

    if local:
        life.watch_ray(str(session_folder() / "logs"))
        app.share_cores(config.models, os.cpu_count() or 1)
    else:
        life.watch_cluster(ray.get_runtime_context().gcs_address)
    _say(f"starting {', '.join(entry.name for entry in config.models)}")
    app.deploy(config.models, config.start_deadline_s, _say)
    if not local:  # another command may have died there in the middle of an upgrade
        try:
            upgrade.reset(config.models)
        except (RayError, TimeoutError) as error:
            raise RunError(f"the shares of versions cannot be reset: {_first_line(error)}") from error


def _say(text: str) -> None:
    print(text, flush=True)


def _no_cut_off_request(record: logging.LogRecord) -> bool:
    """False for requests that were cut off when serving ended: their clients took too long."""
    return not (record.exc_info and isinstance(record.exc_info[1], asyncio.CancelledError))


def _watch(config: Any, registered: dict[str, Any], asked_to_stop: threading.Event) -> None:
    """Until the end: puts new champions of the registry in the place of old ones, one at a time."""
    from srl_rlvr.registry import champions

    tried: Counter[Any] = Counter()  # how often the versions that went back were tried
    while not asked_to_stop.wait(config.upgrade.registry_every_s if registered else None):
        try:
            found = champions.find(Path(config.runs), *{each.name for each in registered.values()})
        except Exception as error:  # whatever the store raises, the models go on
            _say(f"WARNING: the registry cannot be read: {_first_line(error)}")
            continue
        for entry in config.models:
            before = registered.get(entry.name)
            champion = found[before.name] if before else None
            if champion is None or champion == before or tried[entry.name, champion] >= _TRIES:
                continue
            if asked_to_stop.is_set():
                return
            if _upgrade(config, entry, champion, asked_to_stop.is_set, tried):
                registered[entry.name] = champion


def _upgrade(config: Any, entry: Any, champion: Any, stopped: Callable[[], bool], tried: Counter[Any]) -> bool:
    """Whether the champion is in the place of the entry's version now. One that is judged is not tried again; after
    an error of Ray's it is, a few times."""
    from serve import upgrade
    from srl_rlvr.errors import InputError
    from srl_rlvr.registry import champions

    key = (entry.name, champion)
    tried[key] += 1
    _say(f"{entry.name}: the champion is now {champion}")
    try:
        path = str(champions.fetch(champion, _registry_cache()))
        new = entry.model_copy(update={"path": path})
        if upgrade.upgrade(config.models, new, config.upgrade, config.start_deadline_s, _say, stopped):
            entry.path = path
            return True
        tried[key] = _TRIES
    except InputError as error:
        _say(f"{entry.name}: the old version stays: {error}")
    except Exception as error:  # an actor that dies must not end the watch
        _say(f"{entry.name}: WARNING: the upgrade broke off, the old version answers: {_first_line(error)}")
    return False


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines() or [""]
    return f"{type(error).__name__}: {lines[0]}"[:300]


def _registry_cache() -> Path:
    from srl_rlvr.cli.session import model_cache

    return model_cache().parent / "registry"
