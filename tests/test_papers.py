import pytest

from foveate.papers import Paper, papers


def test_papers_are_numbered_without_gaps():
    assert [paper.number for paper in papers()] == list(range(len(papers())))
    assert len(papers()) > 300


def test_every_paper_has_family_name_and_title():
    assert all(p.family and p.short_name and len(p.title) > 5 for p in papers())


def test_first_paper_is_read_field_by_field():
    first = papers()[0]
    assert (first.family, first.short_name) == ("sparse", "flexprefill")
    assert first.title.startswith("FlexPrefill: A Context-Aware Sparse Attention Mechanism")


def test_papers_cannot_be_changed():
    with pytest.raises(AttributeError):
        papers()[0].title = "another"
    assert isinstance(papers(), tuple) and isinstance(papers()[0], Paper)
