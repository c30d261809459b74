"""Finding backends: entry points, one at a time, each failure kept with its reason.

pluggy's own loader stops at the first broken plugin and lets a misspelt hook pass, so this module iterates the entry
points itself, checks each plugin in a manager of its own, and only then lets it in.
"""

from __future__ import annotations

import contextvars
import importlib.metadata
import inspect
import logging
import operator
import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Final

import pluggy

from . import hookspecs
from .errors import PluginError, describe, show
from .hookspecs import PROJECT
from .settings import env_flag, env_list
from .types import HOOK_API, STAGES, BackendInfo

GROUP: Final = "moe_core.backends"
OWN_DISTRIBUTION: Final = "moe-core"
STAGE_HOOKS: Final[Mapping[str, str]] = {stage: f"moe_{stage}" for stage in (*STAGES, "dispatch", "combine")}
logger = logging.getLogger(PROJECT)


class NoAnswer(Exception):
    """A plugin was asked and hangs."""


@dataclass
class LoadedPlugin:
    """One entry point (or registered object) and what became of it.

    ``status`` is ``ok``, ``broken``, ``incompatible`` or ``disabled``; ``impls`` maps a hook's name to its plain
    (not wrapping) implementation, ``wrappers`` holds the names of the hooks that it wraps.
    """

    name: str
    status: str = "ok"
    reason: str = ""
    remedy: str = ""
    origin: str = ""
    plugin: object = None
    info: BackendInfo | None = None
    impls: dict[str, pluggy.HookImpl] = field(default_factory=dict)
    wrappers: tuple[str, ...] = ()
    unanswered: threading.Thread | None = field(default=None, repr=False)
    answered: bool = False

    def fail(self, status: str, reason: str, remedy: str) -> LoadedPlugin:
        """Mark as not usable; what was loaded is dropped."""
        self.status, self.reason, self.remedy = status, reason, remedy
        self.impls, self.wrappers = {}, ()
        return self

    @property
    def is_backend(self) -> bool:
        """False for pure observers."""
        return self.info is not None

    def call(self, hook: str, **arguments: Any) -> Any:
        """Call this plugin's own implementation of a hook with the arguments that it takes."""
        impl = self.impls[hook]
        return impl.function(*(arguments[name] for name in impl.argnames))

    def call_in_time(self, hook: str, seconds: float, **arguments: Any) -> Any:
        """:meth:`call`, given up after ``seconds``; 0 waits for ever, in the calling thread.

        The call runs in a daemon thread, because nothing else can be left behind when it hangs; while it hangs, the
        plugin is not called again. A plugin that has answered once has imported what it needs, so from then on it is
        called directly: a thread costs 0.1 ms, and a bind probes every backend. A call that holds the GIL cannot be
        given up.

        Raises:
            NoAnswer: none in time, or an earlier call still has none.
        """
        if not seconds or self.answered:
            return self.call(hook, **arguments)
        if self.unanswered is not None and self.unanswered.is_alive():
            raise NoAnswer(f"{hook} was asked before and has not answered yet")
        answers: list[Any] = []
        errors: list[BaseException] = []

        def ask() -> None:
            try:
                answers.append(self.call(hook, **arguments))
            except BaseException as error:  # raised again below, in the thread that asked
                errors.append(error)

        context = contextvars.copy_context()
        thread = threading.Thread(target=context.run, args=(ask,), name=f"{hook} of {self.name}", daemon=True)
        thread.start()
        thread.join(seconds)
        if errors:
            raise errors[0]
        if not answers:
            self.unanswered = thread
            raise NoAnswer(f"{hook} did not answer in {seconds:g} s")
        self.answered = True
        return answers[0]


def adapt(impl: pluggy.HookImpl, spec_arguments: tuple[str, ...]) -> Callable[..., Any]:
    """The implementation as a plain function of all of the specification's arguments, in their order.

    A hook call through pluggy costs 1.5 to 3 us, a plain call under 0.1; four stages times 48 layers is too much to
    pay for each decoded token.
    """
    if tuple(impl.argnames) == spec_arguments:
        return impl.function
    positions = [spec_arguments.index(name) for name in impl.argnames]
    function = impl.function
    if len(positions) < 2:  # of one position itemgetter gives no tuple
        return lambda *arguments: function(*[arguments[position] for position in positions])
    taken = operator.itemgetter(*positions)
    return lambda *arguments: function(*taken(arguments))


def spec_arguments(hook: str) -> tuple[str, ...]:
    """The argument names of a hook specification."""
    return tuple(inspect.signature(getattr(hookspecs, hook)).parameters)


def new_manager() -> pluggy.PluginManager:
    """A manager that knows the specifications and no plugin."""
    manager = pluggy.PluginManager(PROJECT)
    manager.add_hookspecs(hookspecs)
    return manager


def check_plugin(plugin: object, name: str, origin: str = "") -> LoadedPlugin:
    """Check one plugin on its own. Never raises for a plugin's fault: the result says what is wrong."""
    loaded = LoadedPlugin(name, origin=origin, plugin=plugin)
    mend = f"report it to the author of {origin or name}, or set MOE_CORE_DISABLE={name}"
    _read_info(loaded, mend)
    if loaded.status != "ok":
        return loaded
    manager = new_manager()
    try:
        manager.register(plugin, name)
        manager.check_pending()
    except KeyboardInterrupt:
        raise
    except BaseException as error:  # anything at all may come out of a third party's object
        return loaded.fail("broken", _one_line(error), mend)
    wrappers = []
    for caller in manager.get_hookcallers(plugin) or ():
        for impl in caller.get_hookimpls():
            fault = _signature_fault(impl.function)
            if fault:
                return loaded.fail("broken", f"{caller.name}: {fault}", mend)
            if impl.hookwrapper or impl.wrapper:
                wrappers.append(caller.name)
            else:
                loaded.impls[caller.name] = impl
    loaded.wrappers = tuple(wrappers)
    if not loaded.impls and not loaded.wrappers:
        return loaded.fail("broken", "implements no hook; hooks are marked with @moe_core.hookimpl", mend)
    stages = sorted(set(loaded.impls) - {"moe_bound"})
    if loaded.info is None and stages:
        return loaded.fail("broken", f"implements {', '.join(stages)} without moe_backend_info", mend)
    return loaded


def _signature_fault(function: Callable[..., Any]) -> str:
    for parameter in inspect.signature(function).parameters.values():
        if parameter.default is not parameter.empty:
            return (
                f"argument {parameter.name} has a default value, which pluggy before 1.7 never passes; "
                f"remove the default"
            )
        if parameter.kind not in (parameter.POSITIONAL_ONLY, parameter.POSITIONAL_OR_KEYWORD):
            return f"argument {parameter.name} is {parameter.kind.description}; hooks take positional arguments only"
    return ""


def _read_info(loaded: LoadedPlugin, mend: str) -> None:
    # Before anything else is checked: a plugin of another major may have hooks and arguments that are unknown here.
    try:
        function = getattr(loaded.plugin, "moe_backend_info", None)
        if function is None or getattr(function, f"{PROJECT}_impl", None) is None:
            return
        info = function()
    except KeyboardInterrupt:
        raise
    except BaseException as error:
        loaded.fail("broken", f"moe_backend_info raised {describe(error)}", mend)
        return
    if not isinstance(info, BackendInfo):
        loaded.fail("broken", f"moe_backend_info returned {show(info)}, expected a BackendInfo", mend)
    elif info.hook_api != HOOK_API:
        loaded.info = info
        loaded.fail(
            "incompatible",
            f"written for hook API {info.hook_api}, this moe_core has {HOOK_API}",
            f"install a version of {loaded.origin or loaded.name} for hook API {HOOK_API}, "
            f"or a moe-core that has {info.hook_api}",
        )
    elif info.name != loaded.name:
        loaded.fail(
            "broken", f"BackendInfo.name={info.name!r} differs from the entry point's name {loaded.name!r}", mend
        )
    else:
        loaded.info = info


def _one_line(error: BaseException) -> str:
    return f"{type(error).__name__}: {'; '.join(str(error).splitlines())}"


class Registry:
    """All plugins of one state of the process: loaded once, never changed afterwards."""

    def __init__(self, plugins: list[LoadedPlugin]) -> None:
        self.plugins: Mapping[str, LoadedPlugin] = {plugin.name: plugin for plugin in plugins}

    def __iter__(self) -> Iterator[LoadedPlugin]:
        return iter(self.plugins.values())

    def names(self) -> list[str]:
        """Names that a user may ask for: everything but observers."""
        return [plugin.name for plugin in self if plugin.is_backend or plugin.status != "ok"]

    def wrappers_of(self, hook: str) -> list[LoadedPlugin]:
        """Observers that wrap a hook, in the order of their names: install order decides nothing."""
        return sorted((p for p in self if p.status == "ok" and hook in p.wrappers), key=lambda p: p.name)

    def notify_bound(self, report: Any) -> None:
        """Tell every observer of ``moe_bound``; their failures are logged."""
        for plugin in self:
            if "moe_bound" in plugin.impls:
                try:
                    plugin.call("moe_bound", report=report)
                except KeyboardInterrupt:
                    raise
                except BaseException:  # an observer must not be able to end the process that it watches
                    logger.exception("moe_bound of plugin %s failed; the runner is bound all the same", plugin.name)


_lock = threading.RLock()
_cached: tuple[object, Registry] | None = None
_registered: dict[str, object] = {}


def registry() -> Registry:
    """The plugins of this process; loaded at first use and again when sys.path or the block lists have changed."""
    global _cached
    disabled, only = env_list("MOE_CORE_DISABLE"), env_list("MOE_CORE_BACKENDS_ONLY")
    with _lock:
        traced = env_flag("MOE_CORE_TRACE")
        key = (
            tuple(sys.path),
            disabled,
            only,
            traced,
            tuple((name, id(plugin)) for name, plugin in _registered.items()),
        )
        if _cached is None or _cached[0] != key:
            _cached = (key, Registry(_load_all(disabled, only, traced)))
        return _cached[1]


def register(plugin: object, name: str) -> None:
    """Register a backend or an observer by hand, for this process.

    Raises:
        PluginError: it breaks the hook contract, or the name is taken.
    """
    checked = check_plugin(plugin, name, origin="moe_core.plugins.register")
    if checked.status != "ok":
        raise PluginError(f"plugin {name!r} is {checked.status}: {checked.reason}; {checked.remedy}")
    with _lock:
        if name in registry().plugins:
            raise PluginError(f"plugin name {name!r} is taken; unregister the other one or choose another name")
        _registered[name] = plugin


def unregister(name: str) -> None:
    """Undo :func:`register`.

    Raises:
        PluginError: ``name`` was not registered by hand.
    """
    with _lock:
        if name not in _registered:
            raise PluginError(f"plugin {name!r} was not registered by hand; known: {', '.join(_registered) or 'none'}")
        del _registered[name]


def reload() -> Registry:
    """Forget what was loaded and look at the entry points again."""
    global _cached
    with _lock:
        _cached = None
    return registry()


def _load_all(disabled: tuple[str, ...], only: tuple[str, ...], traced: bool) -> list[LoadedPlugin]:
    from . import observe, reference  # the reference imports the types that this module's callers import

    loaded = [check_plugin(reference, "reference", origin=OWN_DISTRIBUTION)]
    if traced:
        loaded.append(check_plugin(observe.Trace(), "trace", origin=OWN_DISTRIBUTION))
    by_name: dict[str, list[importlib.metadata.EntryPoint]] = {}
    for entry in importlib.metadata.entry_points(group=GROUP):
        same = by_name.setdefault(entry.name, [])
        # One distribution can be found twice (an editable install beside its egg-info).
        if all((other.value, _dist(other)) != (entry.value, _dist(entry)) for other in same):
            same.append(entry)
    for variable, names in (("MOE_CORE_DISABLE", disabled), ("MOE_CORE_BACKENDS_ONLY", only)):
        for name in sorted({*names} - {*by_name, "reference"}):
            # Not an error: one setting may serve many machines, and not all of them have every plugin.
            logger.warning("%s names %r, which is not installed; known: %s", variable, name, ", ".join(sorted(by_name)))
    for name, entries in sorted(by_name.items()):
        loaded.append(_load_name(name, entries, disabled, only))
    taken = {plugin.name for plugin in loaded}
    for name, plugin in _registered.items():
        if name not in taken:
            loaded.append(check_plugin(plugin, name, origin="moe_core.plugins.register"))
    for plugin_ in loaded:
        if plugin_.status in ("broken", "incompatible"):
            logger.warning("backend %s is %s: %s; %s", plugin_.name, plugin_.status, plugin_.reason, plugin_.remedy)
    return loaded


def _load_name(
    name: str, entries: list[importlib.metadata.EntryPoint], disabled: tuple[str, ...], only: tuple[str, ...]
) -> LoadedPlugin:
    if name in disabled:
        return LoadedPlugin(name).fail(
            "disabled", "blocked by MOE_CORE_DISABLE", f"remove {name} from MOE_CORE_DISABLE"
        )
    if only and name not in only:
        return LoadedPlugin(name).fail(
            "disabled", "not in MOE_CORE_BACKENDS_ONLY", f"add {name} to MOE_CORE_BACKENDS_ONLY"
        )
    own = [entry for entry in entries if _dist(entry) == OWN_DISTRIBUTION]
    rivals = [entry for entry in entries if entry not in own]
    if name == "reference" or (not own and len(rivals) > 1):
        claims = ", ".join(sorted(f"{_dist(entry)} ({entry.value})" for entry in entries))
        return LoadedPlugin(name if name != "reference" else f"reference ({claims})", origin=claims).fail(
            "broken",
            f"duplicate name, claimed by {claims}",
            "uninstall all but one, or ask the author for another name",
        )
    if own and rivals:
        # A built-in name stays with its owner: a stranger must not be able to switch it off.
        claims = ", ".join(_dist(entry) for entry in rivals)
        logger.warning(
            "backend name %s is also claimed by %s, whose plugin is not loaded: duplicate name", name, claims
        )
    entry = (own or rivals)[0]
    origin = _dist(entry)
    try:
        plugin = entry.load()
    except KeyboardInterrupt:
        raise
    except BaseException as error:  # an import runs any code there is, sys.exit() among it
        return LoadedPlugin(name, origin=origin).fail(
            "broken",
            f"import of {entry.value} failed: {describe(error)}",
            f"reinstall or uninstall {origin}, or set MOE_CORE_DISABLE={name}",
        )
    return check_plugin(plugin, name, origin)


def _dist(entry: importlib.metadata.EntryPoint) -> str:
    return entry.dist.name if entry.dist is not None else "an unknown distribution"
