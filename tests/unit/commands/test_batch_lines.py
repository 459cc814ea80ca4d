"""Lines of results of batches, in OpenAI's form."""

from __future__ import annotations

from mesh.client import BatchResult, BatchStatus, Completion
from mesh.commands.batch_lines import RequestLine, result_line
from mesh.protocol.stream import Answer, Timing, Token, Usage

BATCH = BatchStatus(id="b", model="tiny", state="done", total=1, running=0, done=1, failed=0, submitted_unix_s=1_700_000_000.5)
TOKENS = (Token(5, -1.0, ((5, -1.0), (7, -2.0)), "Yes", ("Yes", "No")),)
ANSWER = Answer("r", (5,), "Yes", "length", Usage(3, 1), Timing(0, 0, None, 0, 0, None, 0), logprobs=TOKENS)


def test_log_probabilities_that_were_asked_for_are_in_the_answer() -> None:
    result = BatchResult(0, Completion.of(ANSWER), None)
    chat, text = (
        result_line(result, RequestLine(1, {}, "mine", url), BATCH)["response"]["body"]
        for url in ("/v1/chat/completions", "/v1/completions")
    )
    (said,) = chat["choices"][0]["logprobs"]["content"]
    assert (said["token"], said["logprob"], said["bytes"]) == ("Yes", -1.0, list(b"Yes"))
    assert [(one["token"], one["logprob"]) for one in said["top_logprobs"]] == [("Yes", -1.0), ("No", -2.0)]
    assert text["choices"][0]["logprobs"]["top_logprobs"] == [{"Yes": -1.0, "No": -2.0}]


def test_an_answer_is_the_document_that_http_would_give() -> None:
    line = result_line(BatchResult(0, Completion.of(ANSWER), None), RequestLine(1, {}, "mine", "/v1/chat/completions"), BATCH)
    body = line["response"].pop("body")
    assert line == {"id": "batch_req_0", "custom_id": "mine", "response": {"status_code": 200, "request_id": "r"}, "error": None}
    assert (body["id"], body["object"], body["model"], body["created"]) == ("chatcmpl-r", "chat.completion", "tiny", 1_700_000_000)
    assert body["choices"][0]["message"]["content"] == "Yes" and body["choices"][0]["finish_reason"] == "length"
    nothing = {"cached_tokens": 0}
    assert body["usage"] == {"prompt_tokens": 3, "completion_tokens": 1, "total_tokens": 4, "prompt_tokens_details": nothing}
