"""Numbers in a page's text, against arithmetic by hand."""

import pytest
from placeholders import fill, parse, rows_named
from recorded import Row
from table import Table

NEURON = {"class": "neurons.SILIFNode", "args": {"max_spike_count": 32}}
TRAINING = {"max_steps": 512, "per_device_train_batch_size": 64}
NAMES = ("4.76x: D=64, 75M tokens", "tanh(x/D), the source's", "control", "unsuccessful")
TABLE = Table(
    name="small",
    teacher="none",
    data="none",
    held_out="none",
    common={"length": 512, "neuron": NEURON, "threshold": 0.43, "training": TRAINING},
    rows=[{"name": name} for name in NAMES],
)


def run(perplexity, gain, teacher=16.0, **others):
    after = {"perplexity": perplexity, "mean_abs": 5.0 / gain, "gain": {"fp32": gain}}
    return {"status": "done", "after": after, "teacher": {"perplexity": teacher}} | others


def driven(perplexity, without):
    return {"checks": {"spike_driven": {"perplexity": perplexity, "without": without}}}


RUNS = {
    NAMES[0]: [run(17.0, 4.0, **driven(9.9, 10.0)), run(18.0, 4.0, **driven(10.5, 10.0)), run(19.0, 4.0)],
    NAMES[1]: [run(20.0, 5.0)],
    NAMES[2]: [run(16.0, 1.0), run(16.0, 1.0)],
    NAMES[3]: [{"status": "diverged"}],
}


def find(name):
    (row,) = [row for row in TABLE.rows if row["name"] == name.removeprefix("small::")]
    return Row(TABLE, row, RUNS[row["name"]])


@pytest.mark.parametrize(
    ("text", "filled"),
    [
        ("nothing to fill in", "nothing to fill in"),
        ("{perplexity[4.76x: D=64, 75M tokens]:.2f}, then", "18.00, then"),
        ("{perplexity[small::control]:.1f}", "16.0"),
        ("{perplexity.min[4.76x: D=64, 75M tokens]:.0f} to", "17 to"),
        ("{perplexity.max[4.76x: D=64, 75M tokens]:+,.1f}", "+19.0"),
        # sd 1 of three: 4.3027 / sqrt(3) = 2.484
        ("{perplexity.low[4.76x: D=64, 75M tokens]:.3f}", "15.516"),
        ("{perplexity.high[4.76x: D=64, 75M tokens]:.3f}", "20.484"),
        ("{perplexity[4.76x: D=64, 75M tokens | control]:+.1f} %", "+12.5 %"),
        ("{perplexity.abs[4.76x: D=64, 75M tokens | 4.76x: D=64, 75M tokens]:.3f}", "5.556"),  # 1 of 18
        # seeds are not the same: Welch's interval, of whose two parts one is 0: 12.5 % -+ 2.484 of 16
        ("{perplexity.low[4.76x: D=64, 75M tokens | control]:.3f}", "-3.026"),
        ("{perplexity.high[4.76x: D=64, 75M tokens | control]:.3f}", "28.026"),
        ("{times mean_abs[control | tanh(x/D), the source's]:.1f} times", "5.0 times"),
        ("{abs mean_abs[tanh(x/D), the source's | control]:.0f}", "80"),
        # at a gain of 4, between 16 at 1 and 20 at 5: 19
        ("{perplexity[4.76x: D=64, 75M tokens | control + tanh(x/D), the source's]:.3f}", "-5.263"),
        ("{perplexity[4.76x: D=64, 75M tokens | tanh(x/D), the source's + control]:.3f}", "-5.263"),
        ("{min gain[control; tanh(x/D), the source's]:.0f}", "1"),
        ("{max gain[control; tanh(x/D), the source's]:.0f}", "5"),
        ("{abs perplexity[control | tanh(x/D), the source's; control | control]:.0f}", "20"),
        ("{over_teacher[tanh(x/D), the source's]:.1f}", "25.0"),
        ("{spike_driven[4.76x: D=64, 75M tokens]:+.1f}", "+2.0"),  # -1 % and +5 %
        ("{spike_driven.abs[4.76x: D=64, 75M tokens]:+.1f}", "+5.0"),
        ("{spike_driven.min[4.76x: D=64, 75M tokens]:+.1f}", "-1.0"),
        ("{tokens[control]:.1f}M", "16.8M"),
        ("{cut_off[control]:.2f}", "13.76"),
        ("{seeds[4.76x: D=64, 75M tokens]}, {seeds[tanh(x/D), the source's]}", "three seeds, one seed"),
        ("{min seeds[control; tanh(x/D), the source's]} each", "one seed each"),
    ],
)
def test_by_hand(text, filled):
    assert fill(text, find) == filled


def test_the_rows_that_a_text_rests_on():
    text = "{gain[a]:.1f} {max gain[b | a; other::c | d + e]:.1f} {seeds[a]}"
    assert rows_named(text) == ["a", "b", "other::c", "d", "e"]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("{gian[control]:.1f}", "did you mean 'gain'"),
        ("{gain.maximum[control]:.1f}", "did you mean 'max'"),
        ("{most gain[control]:.1f}", "Unknown key 'most'"),
        ("{gain[control]}", "must have a form"),
        ("{seeds[control]:.1f}", "must have a form"),
        ("{gain[control]:.99999f}", "no placeholder"),
        ("{gain[control]:>9999999}", "no placeholder"),
        ("{gain.__class__[control]:.1f}", "Unknown key '__class__'"),
        ("{gain[control].x:.1f}", "no placeholder"),
        ("{gain}", "no placeholder"),
        ("{}", "no placeholder"),
        ("{gain[]:.1f}", "must be a row"),
        ("{gain[control | ]:.1f}", "must be a row"),
        ("{gain[a | b | c]:.1f}", "must be a row"),
        ("{gain[a | b + c + d]:.1f}", "must be a row"),
        ("{max gain[control;]:.1f}", "must be a row"),
        ("{gain[a; b]:.1f}", "say min, max or abs"),
        ("{times gain[a | b; c | d]:.1f}", "say min, max or abs"),
        ("{times gain[a]:.1f}", "times needs a row"),
        ("a { alone", "brace stands alone"),
        ("a } alone", "brace stands alone"),
    ],
)
def test_what_is_no_placeholder(text, said):
    with pytest.raises(ValueError, match=said):
        parse(text)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("{gain[unsuccessful]:.1f}", "'unsuccessful' has no gain"),
        ("{gain[control | unsuccessful]:.1f}", "'unsuccessful' has no gain"),
        ("{whole_model[control]:.1f}", "'control' has no whole_model"),
        ("{perplexity.low[4.76x: D=64, 75M tokens | tanh(x/D), the source's]:.1f}", "there is no interval"),
        ("{gain.low[4.76x: D=64, 75M tokens | control]:.1f}", "changes of perplexity alone"),
        ("{int8[control]:.1f}", "'control' has no int8"),
        ("{gain.low[tanh(x/D), the source's]:.1f}", "one seed has no interval"),
        ("{perplexity[tanh(x/D), the source's | control + 4.76x: D=64, 75M tokens]:.1f}", "not between"),
    ],
)
def test_a_number_that_no_run_gave(text, said):
    with pytest.raises(ValueError, match=said):
        fill(text, find)
