"""The Jinja entry: the names of the globals and filters that copier.yml and template/ use.

Copier's loader executes this file alone, without its siblings. During `copier update` the old and
the new version of the template run in one process, so the siblings are imported as a package whose
name is unique to this checkout: each version gets its own code.
"""

from __future__ import annotations

import importlib
import importlib.util
import json
import os
import sys
import traceback
from hashlib import sha256
from pathlib import Path
from types import ModuleType
from typing import Any, NoReturn

from copier.errors import UserMessageError
from jinja2 import Environment, Template, pass_context
from jinja2.ext import Extension
from jinja2.runtime import Context


def _package() -> str:
    """Import the folder of this file as a package of its own; returns the package's name."""
    here = Path(__file__).resolve().parent
    name = f"tkt_text_embeddings_{sha256(str(here).encode()).hexdigest()[:12]}"
    if name not in sys.modules:
        spec = importlib.util.spec_from_file_location(
            name, here / "__init__.py", submodule_search_locations=[str(here)]
        )
        assert spec is not None
        assert spec.loader is not None
        package = importlib.util.module_from_spec(spec)
        sys.modules[name] = package
        spec.loader.exec_module(package)
    return name


def _module(name: str) -> ModuleType:
    return importlib.import_module(f"{_package()}.{name}")


_TRACEBACK = "TKT_TRACEBACK"
"""Environment variable that shows where an error came from."""


def _speak_in_one_line(environment: Environment) -> None:
    """Let every error of questions and files reach the user as Copier's own one-line error."""
    errors, usual = _module("errors"), environment.handle_exception

    def handle_exception(source: str | None = None) -> NoReturn:
        error = sys.exc_info()[1]
        if isinstance(error, UserMessageError) or os.environ.get(_TRACEBACK):
            usual(source)
        if isinstance(error, errors.TemplateError):
            raise UserMessageError(str(error)) from None
        # Its text may hold what must not be shown, an address with a login for one.
        place = traceback.extract_tb(error.__traceback__)[-1] if error else None
        where = f" in {Path(place.filename).name}, line {place.lineno}" if place else ""
        raise UserMessageError(
            errors.one_line(
                f"The template met what it does not know ({type(error).__name__}{where}): set "
                f"{_TRACEBACK}=1 to see where it came from, and report it."
            )
        ) from None

    environment.handle_exception = handle_exception  # type: ignore[method-assign]


def _compile_once(environment: Environment) -> None:
    """Keep compiled strings: Copier compiles each part of each file's path anew, a third of a render.

    (`Worker._render_parts` and `answers_relpath` in copier/_main.py, 9.19.1.)
    """
    compile_string = environment.from_string
    kept: dict[str, Template] = {}

    def from_string(source: Any, *args: Any, **kwargs: Any) -> Template:
        if args or kwargs or not isinstance(source, str):
            return compile_string(source, *args, **kwargs)
        if source in kept:
            environment.preprocess(source)  # forgets the path's `yield` before, as compiling does
        else:
            kept[source] = compile_string(source)
        return kept[source]

    environment.from_string = from_string  # type: ignore[method-assign]


class TextEmbeddings(Extension):
    """Registers what copier.yml and template/ call. How it works is the other modules' business."""

    def __init__(self, environment: Environment) -> None:
        super().__init__(environment)
        _compile_once(environment)
        _speak_in_one_line(environment)
        answers, accelerator, catalog, texts = map(
            _module, ("answers", "accelerator", "catalog", "texts")
        )
        # Pins resolved by this environment, by (model_id, model_version): Copier asks for a
        # default more than once, and a fresh pin must not count as stale (-d refresh=true).
        resolved: dict[tuple[str, str], dict[str, Any]] = {}
        listed: list[tuple[str, str]] = []

        @pass_context
        def answers_are_valid(context: Context) -> bool:
            """Check all answers given so far, before Copier turns a wrong one into a traceback."""
            # Jinja has a global called `namespace`: that one is no answer.
            none = environment.globals
            given = {
                n: context[n]
                for n in answers.NAMES
                if n in context and (n not in none or context[n] is not none[n])
            }
            answers.check(given)
            usual = context["_copier_conf"]["settings"].defaults
            answers.check_defaults({n: usual[n] for n in answers.NAMES if n in {*usual} - {*given}})
            if "pin" in context and not refreshing(context):
                _module("pin").Pin.from_mapping(answers.mapping(context["pin"]))
            return True

        def offered(context: Context) -> list[tuple[str, str]]:
            """(label, model id) of what a person can choose from; [] when nobody is asked."""
            conf = context["_copier_conf"]
            if conf["defaults"] or "model_id" in conf["data"]:
                return []
            if not listed:
                listed.extend(source().choices())
            now = context.get("model_id")  # of an update: it stays eligible though it may be gone
            known = now is None or now in (value for _, value in listed)
            return listed if known else [*listed, (now, now)]

        @pass_context
        def registered_models(context: Context) -> str:
            """Choices of `model_id`."""
            return json.dumps(offered(context))

        @pass_context
        def first_model(context: Context, usual: str) -> str:
            """Default of `model_id`: the usual one, or the first that is there to choose."""
            values = [value for _, value in offered(context)]
            return usual if usual in values or not values else values[0]

        def source() -> ModuleType:
            """Who knows models: the registry, or the catalogue when no registry is at hand."""
            return _module("pin") if _module("registry").tracking_uri() else catalog

        def refreshing(context: Context) -> bool:
            """-d refresh=true was given, and no pin with it."""
            wanted = answers.truth(context.get("refresh", False))
            return wanted and "pin" not in context["_copier_conf"]["data"]

        def completing(context: Context) -> bool:
            """-d fetched=… was given, what model-fetch left beside a model, and no pin with it."""
            return "fetched" in context and "pin" not in context["_copier_conf"]["data"]

        def found(context: Context, model_id: str, selector: str) -> Any:
            """What the registry, or the catalogue, has.

            Thinkube installs the component before any model is there, and names one for each pod.
            """
            missing = _module("errors").NotFoundError
            try:
                return source().resolve(model_id, selector)
            except missing as error:
                component = _module("thinkube").is_component(context)
                if not component or selector != "latest" or not catalog.find(model_id):
                    raise
                print(f"{error} The version is left to the pods.", file=sys.stderr)
                return catalog.resolve(model_id, selector)

        @pass_context
        def resolved_pin(context: Context) -> str:
            """The pin of `model_id` at `model_version`, as JSON."""
            key = (context["model_id"], context["model_version"])
            if key not in resolved:
                resolved[key] = renewed(context, *key).to_mapping()
            return json.dumps(resolved[key], ensure_ascii=False)

        def renewed(context: Context, model_id: str, selector: str) -> Any:
            """What the registry has, with the digests that are known of the same version.

            When its digests are to be completed it is the pin that stands, with them.
            """
            pins, earlier = _module("pin"), None
            if "pin" in context:
                try:
                    earlier = pins.Pin.from_mapping(answers.mapping(context["pin"]))
                except _module("errors").ConfigurationError:
                    pass  # a refresh replaces what cannot be read
            if earlier and completing(context) and not pins.stale(earlier, model_id, selector):
                return earlier.with_fetched(answers.mapping(context["fetched"]))
            pin = catalog.enriched(found(context, model_id, selector))
            return pin.with_digests_of(earlier) if earlier else pin

        @pass_context
        def pin_is_asked(context: Context) -> bool:
            """Never; but a pin given as --data must be of the model that is asked for."""
            given = "pin" in context["_copier_conf"]["data"]
            if given and (wrong := pin_problem(context, answers.mapping(context["pin"]))):
                raise _module("errors").ConfigurationError(f"{wrong}: leave pin out.")
            return False

        @pass_context
        def pin_problem(context: Context, pin: object) -> str:
            """Why `pin` must be resolved anew; empty when it stands."""
            key = (context["model_id"], context["model_version"])
            if pin == resolved.get(key):
                return ""
            if refreshing(context):
                return "a refresh was asked for"
            if completing(context):
                return "its digests are to be completed"
            return str(_module("pin").stale(_module("pin").Pin.from_mapping(pin), *key))

        @pass_context
        def answers_agree(context: Context) -> bool:
            """Check the answers that only make sense together, before a file is written."""
            given = given_of(context) | {name: context[name] for name in answers.YES_OR_NO}
            answers.check_together(given, pin_of(context))
            return True

        def given_of(context: Context) -> dict[str, Any]:
            """All answers that the plan follows from."""
            given = {name: context[name] for name in answers.RULES}
            return given | {"tei_edits": answers.truth(context["tei_edits"])}

        def pin_of(context: Context) -> Any:
            """The pin as the cluster gets it."""
            pin = _module("pin").Pin.from_mapping(context["pin"])
            deployed = catalog.deployed(pin, context["model_task"])
            return _module("sizing").limited(deployed, given_of(context))

        @pass_context
        def pinned(context: Context) -> object:
            """The pin with all its keys, which one that was written by hand may lack."""
            return _module("pin").Pin.from_mapping(context["pin"]).to_mapping()

        @pass_context
        def deployed_pin(context: Context) -> object:
            """What pin.json says."""
            return pin_of(context).to_mapping()

        @pass_context
        def in_git(context: Context) -> bool:
            """Whether the new repository is in one of Git already."""
            target = Path(context["_copier_conf"]["dst_path"]).resolve()
            return any((folder / ".git").exists() for folder in (target, *target.parents))

        @pass_context
        def left_out(context: Context) -> str:
            """The files that these answers do not render: patterns, a line each."""
            given = given_of(context) | {n: context[n] for n in ("objects_folder", "page_folder")}
            pin = _module("pin").Pin.from_mapping(context["pin"])
            return "\n".join(_module("layout").left_out(given, pin))

        @pass_context
        def every_tei_edit(context: Context) -> object:
            """The edits of TEI's sources that its image has unless they are turned off."""
            return _module("tei").every_edit(context["accelerator"])

        @pass_context
        def plan(context: Context) -> object:
            """What Kubernetes and TEI are told, from the pin and the accelerator."""
            return _module("sizing").plan(pin_of(context), given_of(context))

        @pass_context
        def usual_tracking_uri(context: Context) -> str:
            """Default of `mlflow_tracking_uri`. Thinkube's own MLflow is in its cluster."""
            uri = _module("registry").tracking_uri()
            here = uri if context["platform"] == "kubernetes" else None
            fits = here and not answers.problem("mlflow_tracking_uri", here)
            return str(_module("egress").usual_tracking_uri(here if fits else None))

        @pass_context
        def usual_platform(context: Context) -> str:
            """Default of `platform`."""
            return str(_module("thinkube").usual_platform(context))

        @pass_context
        def usual_thinkube_deployment(context: Context) -> str:
            """Default of `thinkube_deployment`."""
            return str(_module("thinkube").usual_deployment(context))

        @pass_context
        def thinkube(context: Context) -> object:
            """How Thinkube runs the model."""
            return _module("thinkube").deployment(pin_of(context), given_of(context))

        @pass_context
        def chosen_components(context: Context) -> list[str]:
            """Names of the Kustomize components of this deployment, sorted."""
            return sorted(answers.kustomize_components(context["components"], context["replicas"]))

        @pass_context
        def overlays(context: Context) -> list[Any]:
            """The environments, where there are several."""
            found: list[Any] = answers.overlays(context)
            return found

        functions = {
            "answers_are_valid": answers_are_valid,
            "answers_agree": answers_agree,
            "answer_problem": answers.problem,
            "registered_models": registered_models,
            "first_model": first_model,
            "pin_is_asked": pin_is_asked,
            "resolved_pin": resolved_pin,
            "pin_problem": pin_problem,
            "accelerator_choices": lambda: json.dumps(accelerator.choices()),
            "accelerator_of": accelerator.for_name,
            "chosen_components": chosen_components,
            "overlays": overlays,
            "pinned": pinned,
            "deployed_pin": deployed_pin,
            "plan": plan,
            "thinkube": thinkube,
            "in_git": in_git,
            "left_out": left_out,
            "every_tei_edit": every_tei_edit,
            "usual_platform": usual_platform,
            "usual_tracking_uri": usual_tracking_uri,
            "usual_thinkube_deployment": usual_thinkube_deployment,
            "listener": _module("edge").listener,
            "every_address": lambda: _module("egress").EVERYWHERE,
            "labels_of": _module("edge").split_pairs,
        }
        environment.globals.update(functions)
        environment.filters.update(
            yaml_text=texts.yaml_text,
            yaml_name=texts.yaml_name,
            argument_text=texts.argument_text,
            unit_text=texts.unit_text,
            markdown_code=texts.markdown_code,
            markdown_text=texts.markdown_text,
            shell_text=texts.shell_text,
            without_credentials=texts.without_credentials,
        )
