"""The two protocols: every field in which they differ is said in words, bad names are refused, and the documentation says the same."""

from dataclasses import fields
from pathlib import Path

import pytest

from alignblind_mi.borders.settings import checked
from alignblind_mi.stimuli.concept import ConceptError
from alignblind_mi.stimuli.protocol import DIFFERENCES, PROTOCOLS, ProtocolName, protocol_lines

# Which difference speaks of which fields; a new field must be said too.
SAID = {"Steering": {"same_token"}, "LoRA": {"whole_text"}, "SelfIE, layers": {"read_stream"},
        "SelfIE, sources": {"lead", "every_mention", "as_published", "word_pairs"}}


def test_every_field_differs_and_is_said():
    paper, best = PROTOCOLS["paper"], PROTOCOLS["best"]
    assert {one.topic for one in DIFFERENCES} == set(SAID)
    assert {field.name for field in fields(paper)} == set().union(*SAID.values())
    assert all(getattr(paper, field.name) != getattr(best, field.name) for field in fields(paper))
    assert len(protocol_lines("paper")) == len(protocol_lines("best")) == len(DIFFERENCES)
    assert not set(protocol_lines("paper")) & set(protocol_lines("best"))


@pytest.mark.parametrize("bad", ["", "papers", "PAPER", None, 7, ["paper"]])
def test_a_protocol_that_there_is_not_is_refused_by_name(bad):
    with pytest.raises(ConceptError, match="protocol must be paper or best, got"):
        checked(bad, ProtocolName, "protocol", ConceptError)


def test_the_documentation_takes_the_list_from_here():
    assert "{{ protocol_table() }}" in (Path(__file__).parents[2] / "docs" / "protocol.md").read_text("utf-8")
