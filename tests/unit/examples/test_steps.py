import pytest

from srl_rlvr.examples.steps import one_line_each, operations


def test_a_nested_expression_gives_one_step_for_each_operation_innermost_first():
    assert operations("( 14.0 - ( 4.0 * 3.0 ) )") == ["4 * 3 = 12", "14 - 12 = 2"]


def test_results_are_written_as_people_write_them():
    assert operations("0.1 + 0.2") == ["0.1 + 0.2 = 0.3"]
    assert operations("10 / 4") == ["10 / 4 = 2.5"]
    assert operations("-7 // 2") == ["-7 // 2 = -4"]


@pytest.mark.parametrize("text", ["__import__('os')", "2 ** 9", "x + 1", "1 +", "4 / 0", "True + 1"])
def test_an_expression_that_is_not_arithmetic_is_refused_not_run(text: str):
    with pytest.raises(ValueError, match="'"):
        operations(text)


def test_steps_have_no_line_breaks_and_are_never_blank():
    assert one_line_each(["a\n b", "  ", "c "]) == ["a b", "c"]
