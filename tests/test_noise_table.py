"""What a table of calibrated noise may be used for; how it is made is tested in test_calibrate.py."""

import math

import pytest
from densegrpo.engine import cli
from densegrpo.engine.calibration_picture import draw_table
from densegrpo.engine.config import make_config, read_config
from densegrpo.engine.noise_table import check_table, describe, identity, read_table
from densegrpo.engine.recipes import make_recipe
from densegrpo.engine.schedule import shifted_linear
from test_calibrate import BY_HAND, CONFIG, config_file, write


def test_a_table_made_by_hand_is_drawn_described_and_used(tmp_path):
    table = read_table(write(tmp_path / "a.json", BY_HAND))
    assert describe(table).count("\n") == 3
    assert draw_table(table).size == (720, 560)
    path = config_file(tmp_path, method={"noise_table": "a.json"})
    assert make_recipe(**read_config(path).method).noise.rates(shifted_linear(4)).tolist() == pytest.approx(
        BY_HAND["rates"]
    )


SIDE = {"rates": [1, 1, 1, 1], "positive": [0.5, 0.5, 0.5, 0], "negative": [0.5, 0.5, 0.5, 0]}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", r"noise table .*a\.json is not JSON"),
        ("null", "must be a noise table"),
        ("[1]", "must be a noise table"),
        (BY_HAND | {"rates": [1]}, r'T\+1 "sigmas" and T "rates"'),
        (BY_HAND | {"rates": [1, 2, 3, math.nan]}, r'T\+1 "sigmas" and T "rates"'),
        (BY_HAND | {"kernel": "ode"}, "must be a noise table"),
        (BY_HAND | {"format": "psi"}, "has format 'psi'"),
        (BY_HAND | {"version": 2}, "version 2; known is .* version 1; calibrate again"),
        (BY_HAND | {"before": 3}, 'damaged: "before" must hold'),
        (BY_HAND | {"after": SIDE | {"negative": [0.5]}}, 'damaged: "after" must hold'),
        (BY_HAND | {"model": "demo"}, 'damaged: "model" must be an object'),
        (BY_HAND | {"kernel": "cps"}, "calibrated for kernel cps, not sde; calibrate again"),
        (BY_HAND | {"sigmas": [1, 0.5, 0], "rates": [1, 1]}, r"2 rates but num_steps \(denoising steps\) is 4"),
        (
            BY_HAND | {"model": {"name": "diffusers"}},
            "model .name was 'diffusers', is 'demo'.; calibrate again",
        ),
        (BY_HAND | {"model": {"name": "demo", "guidance": 3.0}}, "guidance was 3.0, is 1.0"),
    ],
)
def test_a_table_that_does_not_fit_is_refused_before_the_model_is_loaded(tmp_path, text, message):
    write(tmp_path / "a.json", text)
    with pytest.raises(ValueError, match=message):
        read_config(config_file(tmp_path, method={"noise_table": "a.json"}))


def test_a_missing_table_is_named_with_the_command_that_makes_it(tmp_path):
    with pytest.raises(ValueError, match=r"gone\.json does not exist; make it with `densegrpo calibrate`"):
        read_config(config_file(tmp_path, method={"noise_table": "gone.json"}))
    with pytest.raises(ValueError, match="cannot be read"):
        read_config(config_file(tmp_path, method={"noise_table": ""}))


def test_other_noise_levels_are_refused_when_the_model_is_there(tmp_path, capsys):
    write(tmp_path / "a.json", BY_HAND | {"sigmas": [1, 0.8, 0.6, 0.3, 0]})
    path = config_file(tmp_path, method={"noise_table": "a.json"})
    assert cli.main(["train", str(path), "--out", str(tmp_path / "runs")]) == 2
    assert "belongs to other noise levels than 1.000, 0.900" in capsys.readouterr().err


def test_what_does_not_change_the_images_does_not_bind_a_table():
    table = BY_HAND | {"model": identity({"name": "demo"})}
    check_table(table, {"name": "demo", "cfg_grad": "full", "dtype": "bfloat16", "shift": 2.0}, 4)
    check_table(None, {"name": "demo"}, 9)
    make_config(CONFIG | {"method": CONFIG["method"] | {"noise_table": table}})
    with pytest.raises(ValueError, match="path was 'a', is 'b'"):
        check_table(BY_HAND | {"model": {"name": "diffusers", "path": "a"}}, {"name": "diffusers", "path": "b"}, 4)
    comfy = {"name": "comfy", "width": 64, "base_model": "SD3"}
    check_table(BY_HAND | {"model": comfy}, {"name": "comfy", "width": 64}, 4)
    with pytest.raises(ValueError, match="base_model was 'SD3', is 'Flux'"):
        check_table(BY_HAND | {"model": comfy}, comfy | {"base_model": "Flux"}, 4)
