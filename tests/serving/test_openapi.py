"""schemathesis against the server's own OpenAPI document: what fits it works, what does not is refused, no 5xx.

Also against a server whose model is behind an API.
"""

from __future__ import annotations

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis.errors import Unsatisfiable

from tests.serving.conftest import Served, proxying, serving, upstream

pytest.importorskip("schemathesis")

import schemathesis
from schemathesis import GenerationMode
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    negative_data_rejection,
    response_schema_conformance,
    status_code_conformance,
)

KEY = {"Authorization": "Bearer root"}
CHECKS = [not_a_server_error, content_type_conformance, response_schema_conformance, status_code_conformance]
OPERATIONS = [
    ("/v1/completions", "POST"),
    ("/v1/chat/completions", "POST"),
    ("/tokenize", "POST"),
    ("/detokenize", "POST"),
    ("/v1/models", "GET"),
    ("/v1/models/{model}", "GET"),
    ("/v1/profiles", "GET"),
    ("/health", "GET"),
    ("/version", "GET"),
    ("/metrics", "GET"),
    ("/admin/values", "GET"),
    ("/admin/values", "POST"),
    ("/admin/values/{name}", "DELETE"),
    ("/admin/profiles", "GET"),
    ("/admin/profiles/{name}", "PUT"),
    ("/admin/profiles/{name}", "DELETE"),
]


@pytest.fixture(scope="module")
def open_server(tmp_path_factory):
    with serving(admin_key="root", values_dir=tmp_path_factory.mktemp("values")) as running:
        yield running
        running.check_idle()


@pytest.fixture(scope="module")
def schema(open_server: Served):
    return schemathesis.openapi.from_url(open_server.url + "/openapi.json")


def test_every_operation_is_tried(schema) -> None:
    found = {(op.path, op.method.upper()) for op in (result.ok() for result in schema.get_all_operations())}
    assert found == set(OPERATIONS)


def test_the_document_says_what_happens(schema) -> None:
    for path, operations in schema.raw_schema["paths"].items():
        for operation in operations.values():
            assert "422" not in operation["responses"], path
            assert "400" in operation["responses"]
    body = schema.raw_schema["components"]["schemas"]["CompletionRequest"]
    assert body["additionalProperties"] is False
    assert body["properties"]["top_p"]["anyOf"][0] == {"type": "number", "maximum": 1.0, "exclusiveMinimum": 0.0}


@pytest.mark.parametrize("mode", list(GenerationMode))
@pytest.mark.parametrize(("path", "method"), OPERATIONS)
def test_an_operation(open_server: Served, schema, path: str, method: str, mode: GenerationMode) -> None:
    fuzz(open_server, schema, path, method, mode, 8)


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("mode", list(GenerationMode))
@pytest.mark.parametrize(("path", "method"), OPERATIONS)
def test_an_operation_at_length(open_server: Served, schema, path: str, method: str, mode: GenerationMode) -> None:
    fuzz(open_server, schema, path, method, mode, 500)


# -- a model behind an API -----------------------------------------------------------------------------------

RELAYED = [operation for operation in OPERATIONS if not operation[0].startswith("/admin/values")]


@pytest.fixture(scope="module")
def relaying():
    with upstream() as behind, proxying(behind, model_name="tiny", admin_key="root") as running:
        yield running


@pytest.fixture(scope="module")
def relayed_schema(relaying: Served):
    return schemathesis.openapi.from_url(relaying.url + "/openapi.json")


def test_every_operation_is_relayed(relayed_schema) -> None:
    found = {(op.path, op.method.upper()) for op in (result.ok() for result in relayed_schema.get_all_operations())}
    assert found == set(RELAYED)


@pytest.mark.parametrize("mode", list(GenerationMode))
@pytest.mark.parametrize(("path", "method"), RELAYED[:4])
def test_a_relayed_operation(relaying: Served, relayed_schema, path: str, method: str, mode: GenerationMode) -> None:
    fuzz(relaying, relayed_schema, path, method, mode, 5)


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("mode", list(GenerationMode))
@pytest.mark.parametrize(("path", "method"), RELAYED)
def test_a_relayed_operation_at_length(
    relaying: Served, relayed_schema, path: str, method: str, mode: GenerationMode
) -> None:
    fuzz(relaying, relayed_schema, path, method, mode, 200)


def fuzz(server: Served, schema, path: str, method: str, mode: GenerationMode, examples: int) -> None:
    operation = schema[path][method]
    parameters = list(operation.iter_parameters())
    if mode is GenerationMode.NEGATIVE and not parameters and not len(operation.body):
        pytest.skip("nothing of it can be wrong")
    positive = mode is GenerationMode.POSITIVE

    @settings(
        max_examples=examples, deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck)
    )
    @given(case=operation.as_strategy(generation_mode=mode))
    def run(case) -> None:
        if positive and isinstance(case.body, dict) and "model" in operation.body[0].definition:
            case.body["model"] = "tiny"
        if positive and isinstance(case.body, dict) and path.startswith("/v1/"):
            case.body |= {"model": "tiny", "max_tokens": 4, "n": 1}  # not refused at the door, and soon done
            case.body.pop("max_completion_tokens", None)
            case.body.pop("min_tokens", None)
        response = case.call(headers=KEY, timeout=60)
        case.validate_response(response, checks=CHECKS if positive else [*CHECKS, negative_data_rejection])

    try:
        run()
    except Unsatisfiable:  # any text will do for a path
        assert not positive
