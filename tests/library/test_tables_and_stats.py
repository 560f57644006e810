"""Tables from rows of cells, and proportions with their intervals."""

from salun_diffusion.stats import proportion, wilson
from salun_diffusion.tables import aligned, latex, markdown

ROWS = [["name", "UA ↑"], ["a|b_c", "98.2 (95.3–99.3)"]]


def test_an_interval_is_wilsons():
    z, p, n = 1.959963984540054, 81 / 263, 263
    centre, half = p + z * z / (2 * n), z * (p * (1 - p) / n + z * z / (4 * n * n)) ** 0.5
    score = wilson(81, 263, digits=6)
    assert score["low"] == round(100 * (centre - half) / (1 + z * z / n), 6)
    assert score["high"] == round(100 * (centre + half) / (1 + z * z / n), 6)
    assert proportion([True] * 81 + [False] * 182) == wilson(81, 263) and proportion([]) is None


def test_cells_are_escaped_for_each_format():
    assert markdown(ROWS) == "| name | UA ↑ |\n| --- | --- |\n| a\\|b_c | 98.2 (95.3–99.3) |"
    assert aligned(ROWS) == "name   UA ↑\na|b_c  98.2 (95.3–99.3)"
    text = latex(ROWS, "of `a_b`, 5%")
    assert "  name & UA $\\uparrow$ \\\\\n\\midrule\n  a|b\\_c & 98.2 (95.3--99.3) \\\\\n" in text
    assert "\\caption{of a\\_b, 5\\%}" in text


def test_a_table_holds_no_html_and_no_command():
    hostile = [["a"], ["<img src=x onerror=alert(1)>&lt;\n\\input{x}"]]
    assert markdown(hostile).endswith("| &lt;img src=x onerror=alert(1)&gt;&amp;lt; \\input{x} |")
    assert "\\textbackslash{}input\\{x\\}" in latex(hostile, "c") and "\\input" not in latex(hostile, "c")
