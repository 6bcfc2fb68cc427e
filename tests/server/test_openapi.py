"""schemathesis on the generated OpenAPI: what fits a route's schema and what does not is answered as documented."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from fastsd.server.app import make_app
from fastsd.server.limits import Limits
from fastsd.server.settings import ServerSettings
from tests.support.empty_model import EmptySettings, empty_engine
from tests.support.server import listening, png

OWN = ServerSettings(limits=Limits(side=256, images=4))
SCHEMA = make_app(OWN, empty_engine, EmptySettings()).openapi()
POSTS = [path for path, operations in SCHEMA["paths"].items() if "post" in operations]
FORMS = ("/v1/images/edits",)
PHASES = (Phase.generate,)  # nothing is made smaller: the first case that fails says enough
# Bodies that give images. Bodies by the schema alone hardly do: they hold unknown samplers, and images that are none.
GOOD: dict[str, Any] = {
    "/sdapi/v1/txt2img": {"prompt": "a cat", "width": 8, "height": 8},
    "/sdapi/v1/img2img": {"prompt": "a cat", "init_images": [png((8, 8))]},
    "/sdapi/v1/extra-single-image": {"image": png((8, 8))},
    "/sdapi/v1/png-info": {"image": png((8, 8))},
    "/v1/images/generations": {"prompt": "a cat", "size": "8x8"},
}


@pytest.fixture(scope="module")
def schema() -> Iterator[Any]:
    schemathesis = pytest.importorskip("schemathesis", reason="needs schemathesis, and Python 3.11")
    with listening(OWN) as port:
        yield schemathesis.openapi.from_url(f"http://127.0.0.1:{port}/openapi.json")


def is_wrong_as_a_form(body: Any) -> bool:
    """A form has texts alone: a prompt of another type arrives as a text, which is none the worse for it."""
    return not isinstance(body, dict) or isinstance(body.get("prompt", ""), str)


def cases(operation: Any, path: str, wrong: bool) -> Any:
    """Requests of an operation. Of those that fit, every second is a good body with a few fields of the schema's."""
    from schemathesis import GenerationMode

    if wrong:
        return operation.as_strategy(generation_mode=GenerationMode.NEGATIVE).filter(
            lambda case: path not in FORMS or is_wrong_as_a_form(case.body)
        )
    fitting = operation.as_strategy(generation_mode=GenerationMode.POSITIVE)
    if path not in GOOD:
        return fitting

    @st.composite
    def merged(draw: Any) -> Any:
        case = draw(fitting)
        if isinstance(case.body, dict) and draw(st.booleans()):
            names = [name for name in sorted(case.body) if name not in GOOD[path]]
            kept = draw(st.lists(st.sampled_from(names), max_size=2)) if names else []
            case.body = GOOD[path] | {name: case.body[name] for name in kept}
        return case

    return merged()


def send(schema: Any, path: str, wrong: bool, count: int) -> Counter[int]:
    """So many requests of a route: no mistake of the server, and no answer that is not documented; the statuses."""
    import schemathesis.specs.openapi.checks as of_openapi
    from schemathesis.checks import not_a_server_error

    checks = [
        not_a_server_error,
        of_openapi.status_code_conformance,
        of_openapi.content_type_conformance,
        of_openapi.response_headers_conformance,
        of_openapi.response_schema_conformance,
        *([of_openapi.negative_data_rejection] if wrong else []),
    ]
    found: Counter[int] = Counter()

    @settings(max_examples=count, deadline=None, database=None, phases=PHASES, suppress_health_check=list(HealthCheck))
    @given(case=cases(schema[path]["POST"], path, wrong))
    def each(case: Any) -> None:
        answer = case.call(timeout=60)
        found[answer.status_code] += 1
        case.validate_response(answer, checks=checks)

    each()
    return found


def check(schema: Any, path: str, count: int) -> None:
    """So many requests of a route, half of them wrong; some of the others give images."""
    found = send(schema, path, False, count // 2)
    assert found[200] or path not in GOOD, found
    if "requestBody" in SCHEMA["paths"][path]["post"]:  # what reads nothing has no wrong requests
        send(schema, path, True, count // 2)


@pytest.mark.heavy
@pytest.mark.parametrize("path", POSTS)
def test_what_fits_the_schema_and_what_does_not_is_answered_as_documented(schema: Any, path: str) -> None:
    check(schema, path, 50)


@pytest.mark.slow
@pytest.mark.parametrize("path", POSTS)
def test_a_thousand_of_them(schema: Any, path: str) -> None:
    check(schema, path, 1000)
