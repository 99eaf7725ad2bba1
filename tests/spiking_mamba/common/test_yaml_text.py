"""YAML as settings are written in."""

import pytest

from spiking_mamba.common.yaml_text import load_yaml, read_yaml


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e-3", 1e-3),
        ("0", 0),
        ("-0.5", -0.5),
        ("0x1f", 31),
        ("'010'", "010"),
        ("'1:30'", "1:30"),
        ("2026-11-28", "2026-11-28"),  # a date is as good a name as another
        (".inf", float("inf")),
        ("{a: &a [1, 2], b: *a}", {"a": [1, 2], "b": [1, 2]}),
        ("{<<: {a: 1, b: 1}, a: 2}", {"a": 2, "b": 1}),
        ("", None),
    ],
)
def test_what_is_read(text, value):
    assert load_yaml(text) == value


NINE = "\n".join(
    ["a0: &a0 [x, x, x, x, x, x, x, x, x]"]
    + [f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]" for n in range(1, 9)]
)
CHAIN = "\n".join(["a0: &a0 [x]"] + [f"a{n}: &a{n} [*a{n - 1}]" for n in range(1, 2000)])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: 010", "010 is an octal number"),
        ("a: -010", "-010 is an octal number"),
        ("a: 08", "08 is an octal number"),
        ("a: 1:30", "1:30 is a sexagesimal number"),
        ("a: 1:30.5", "1:30.5 is a sexagesimal number"),
        ("a: 1\nb: 2\na: 3", "line 3 says 'a' again"),
        ("a: {b: 1, b: 2}", "line 1 says 'b' again"),
        (NINE, "aliases expand it to more"),
        (CHAIN, "aliases expand it to more"),
        ("&a [*a]", "contains itself"),
        ("a: &a {b: *a}", "contains itself"),
        ("[" * 3000, "nested deeper"),
        ("a: " + "{a: " * 3000, "nested deeper"),
        ("- " * 3000, "nested deeper"),
        ("a: " + "1" * 5000, "no number"),
        ("a: [", "line 1, column 5"),
        ("a: b: c", "mapping values are not allowed"),
        ("a\0: 1", "unacceptable character"),
        ("!!python/object/apply:os.getcwd []", "could not determine a constructor"),
        ("a: !!timestamp x", "could not determine a constructor"),
        ("a: !!binary eA==", "could not determine a constructor"),
        ("a: !!float x", "no number"),
        ("? [a]\n: 1", "unhashable key"),
        ("a: 1\n--- \nb: 2", "another document"),
        ("a: *b", "undefined alias"),
    ],
)
def test_what_is_refused(text, message):
    with pytest.raises(ValueError, match=message) as refused:
        load_yaml(text)
    assert len(str(refused.value)) < 350
    assert "\n" not in str(refused.value)


def test_files(tmp_path):
    path = tmp_path / "settings.yaml"
    for content, value in [(b"a: 1\n", {"a": 1}), ("\ufeffa: é\n".encode(), {"a": "é"})]:
        path.write_bytes(content)
        assert read_yaml(path) == value
    for content, message in [
        ("a: 1\n".encode("utf-16"), "no text in UTF-8"),
        ("a: 1\n".encode("utf-16-le"), "unacceptable character"),
        (bytes(range(256)) * 10, "no text in UTF-8"),
        (b"a: 1\n" + b"#" * 2**20, "bytes"),
        (b"a: 010\n", "octal"),
    ]:
        path.write_bytes(content)
        with pytest.raises(ValueError, match=message) as refused:
            read_yaml(path)
        assert str(path) in str(refused.value)
        assert "\n" not in str(refused.value)
    for absent, message in [(tmp_path, "is a folder"), (tmp_path / "no.yaml", "There is no settings file")]:
        with pytest.raises(ValueError, match=message) as refused:
            read_yaml(absent)
        assert str(absent) in str(refused.value)
