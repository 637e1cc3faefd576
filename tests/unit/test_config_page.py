"""configs/README.md lists every key of the configuration, as the schema has it now."""

from tatar_dist.config import foreign
from tatar_dist.config.load import known_keys
from tatar_dist.config.page import END, MARKER, NAMES, PAGE, keys_table


def test_the_page_is_what_the_schema_generates():
    below = PAGE.read_text(encoding="utf-8").partition(MARKER)[2]
    assert below.strip() == keys_table().strip(), "run: python -m tatar_dist.config.page"


def test_the_names_of_trl_and_verl_are_what_the_code_knows():
    between = PAGE.read_text(encoding="utf-8").partition(NAMES)[2].partition(END)[0]
    assert between.strip() == foreign.table().strip(), "run: python -m tatar_dist.config.page"


def test_every_key_of_the_schema_is_on_the_page():
    table = keys_table()
    assert [key for key in known_keys() if f"`{key}`" not in table] == []


def test_every_key_has_a_default_and_a_meaning():
    rows = [line.split(" | ") for line in keys_table().splitlines() if line.startswith("| `")]
    assert [row[0] for row in rows if len(row) != 3 or not row[1].strip() or not row[2].strip(" |")] == []
