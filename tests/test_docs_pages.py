"""Generated pages are what their writer makes of the results, and every marked table has one."""

from __future__ import annotations

import pytest

from scripts.docs import tables, write_all


@pytest.mark.parametrize("name", write_all.PAGES)
def test_a_generated_file_is_current(name):
    assert write_all.is_current(name), "run python -m scripts.docs.write_all"


def test_a_table_is_replaced_between_its_marks_and_nothing_else():
    text = "a\n<!-- table: sum 2 3 -->\nold\n<!-- end -->\nb\n<!-- table: none -->\n<!-- end -->\n"

    def no_result():
        raise tables.NotMeasuredError

    kinds = {"sum": lambda a, b: tables.table(["", "x"], [["sum", a + b]]), "none": no_result}
    wanted = (
        "a\n<!-- table: sum 2 3 -->\n\n|  | x |\n| --- | ---: |\n| sum | 23 |\n\n<!-- end -->\nb\n"
        "<!-- table: none -->\n\n*Not measured yet.*\n\n<!-- end -->\n"
    )
    assert tables.filled(text, kinds) == wanted
    assert tables.filled(wanted, kinds) == wanted


def test_every_page_with_marked_tables_is_written_by_the_one_command():
    marked = {f"docs/{p.name}" for p in tables.DOCS.glob("*.md") if "<!-- table:" in p.read_text()}
    assert marked <= set(write_all.PAGES)
    for path in tables.DOCS.glob("*.md"):
        text = path.read_text(encoding="utf-8")
        assert text.count("<!-- table:") == text.count("<!-- end -->")
