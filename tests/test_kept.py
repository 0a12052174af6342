"""How long models stay in memory. Without garbage collection: what is gone went when the last holder did."""

import gc
from importlib.util import find_spec
from threading import Event, Thread
from weakref import ref

import pytest
from densegrpo.engine.protocols import RewardBatch
from densegrpo.engine.rewards import MODEL_REWARDS, make_reward
from densegrpo.engine.rewards.aesthetic import load_head
from densegrpo.engine.rewards.aesthetic_siglip import load_siglip
from densegrpo.engine.rewards.clip import load_clip
from densegrpo.engine.rewards.files import ROOTS_VARIABLE
from densegrpo.engine.rewards.geneval_detector import load_detector
from densegrpo.engine.rewards.hpsv2 import load_hps
from densegrpo.engine.rewards.imagereward import load_scorer
from densegrpo.engine.rewards.kept import HOLDERS, PROCESS, Kept, Place, holding
from densegrpo.engine.rewards.ocr import make_engine
from densegrpo.engine.waiting import Worker
from tiny_reward_models import DETECTOR_SIZE, some_images, write_every_model

LOADERS = (load_clip, load_detector, load_head, load_hps, load_scorer, load_siglip, make_engine)
WANTED = {"tag": "colors", "include": [{"class": name, "count": 1, "color": "red"} for name in ("sheep", "donut")]}
REWARDS = [*sorted(MODEL_REWARDS), "ocr"]
every_reward = pytest.mark.parametrize("name", REWARDS)


class Model:
    """Something large."""

    def __init__(self, *settings):
        self.settings = settings


@pytest.fixture
def load():
    return Kept(Model)


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    folder = tmp_path_factory.mktemp("reward_models")
    write_every_model(folder)
    return folder


@pytest.fixture
def models(root, monkeypatch):
    """Files of all models, none of which is loaded."""
    monkeypatch.setenv(ROOTS_VARIABLE, str(root))
    for loader in LOADERS:
        loader.cache_clear()
    # The first time transformers 4 leaves a cycle behind that holds what its callers know: the next collection's work.
    assert make_reward("clipscore").validate([], []) == []


@pytest.fixture(autouse=True)
def no_collection():
    gc.disable()
    yield
    gc.enable()


def make(name, **options):
    if name == "ocr" and find_spec("rapidocr") is None:
        pytest.skip("rapidocr is not installed")
    return make_reward(name, **{"geneval": {"size": DETECTOR_SIZE}}.get(name, {}), **options)


def score(name, **options):
    result = make(name, **options)(RewardBatch(some_images(2), ['a "red" cat'] * 2, [WANTED] * 2))
    assert result.scores.isfinite().all(), result.errors


def loads():
    return [loader.misses for loader in LOADERS]


def test_equal_arguments_share_one_while_it_is_held(load):
    place = Place()
    with holding(place):
        assert load("a", 1) is load("a", 1)
        assert load("a", 2) is not load("a", 1)
    assert load.misses == len(place.models) == 2


def test_two_loaders_with_equal_arguments_share_nothing(load):
    other = Kept(Model)
    with holding(Place()):
        assert load("a") is not other("a")
        assert len(HOLDERS[-1].models) == 2


def test_it_goes_with_its_last_holder(load):
    first, second = Place(), Place()
    with holding(first):
        model = ref(load("a"))
    with holding(second):
        assert load("a") is model()
    del first
    assert model() is not None
    del second
    assert model() is None


def test_without_holders_the_process_holds_it(load):
    model = ref(load("a"))
    assert load("a") is model()
    assert load.misses == 1
    load.cache_clear()
    assert model() is None
    assert not [key for key in PROCESS.models if key[0] is load]


def test_the_innermost_holder_holds_and_a_failure_ends_it(load):
    outer, inner = Place(), Place()
    with holding(outer):
        with pytest.raises(TypeError, match="hash"), holding(inner):
            load(load("a").settings, [])
        load("b")
    assert [len(place.models) for place in (outer, inner)] == [1, 1]
    assert HOLDERS == [PROCESS]


def test_a_place_holds_what_its_parts_hold(load):
    part = Place()
    with holding(part):
        model = ref(load("a"))
    whole = Place(part)
    del part
    assert model() is not None
    del whole
    assert model() is None


@pytest.mark.parametrize("goes", [0, 1])
def test_what_two_share_goes_when_one_of_them_goes(load, goes):
    both = [Place(), Place()]
    assert both[0].shared_with(both[1]) is both[0].shared_with(both[1])
    with holding(both[0].shared_with(both[1])):
        model = ref(load("a"))
    assert model() is not None
    del both[goes]
    assert model() is None


def test_what_is_shared_with_none_or_itself_is_held_as_well(load):
    place = Place()
    assert place.shared_with(None) is place
    with holding(place.shared_with(place)):
        model = ref(load("a"))
    assert model() is not None
    del place
    assert model() is None


def test_what_a_background_thread_loads_is_held_by_the_place(load):
    place, worker = Place(), Worker()
    with holding(place):
        worker.submit(lambda: load("a") and None).result(5)
    worker.close()
    assert len(place.models) == 1


def test_two_threads_that_ask_at_once_load_once():
    inside, go, found = Event(), Event(), []

    def slow(name):
        inside.set()
        assert go.wait(5)
        return Model(name)

    load = Kept(slow)
    with holding(Place()):
        threads = [Thread(target=lambda: found.append(load("a"))) for _ in range(2)]
        threads[0].start()
        assert inside.wait(5)
        threads[1].start()
        threads[1].join(0.1)
        assert threads[1].is_alive(), "it waits for the first"
        go.set()
        for thread in threads:
            thread.join(5)
    assert load.misses == 1
    assert found[0] is found[1]


def test_a_failure_is_not_remembered():
    answers = [ValueError("the disk is away"), Model()]

    def fail_once():
        answer = answers.pop(0)
        if isinstance(answer, ValueError):
            raise answer
        return answer

    load = Kept(fail_once)
    with holding(Place()):
        with pytest.raises(ValueError, match="the disk is away"):
            load()
        assert load() is load()
    assert load.misses == 1


@every_reward
def test_a_rewards_models_go_with_their_holder(models, name):
    place = Place()
    with holding(place):
        score(name)
        before = loads()
        score(name)
    assert loads() == before, "nothing is loaded a second time while it is held"
    held = [ref(model) for model in place.models.values()]
    held += [ref(weight) for model in place.models.values() if hasattr(model, "model") for weight in parts(model.model)]
    assert len(held) >= len(place.models) == sum(before) > 0
    assert not any(key[0] in LOADERS for key in PROCESS.models)
    del place
    assert not [model() for model in held if model() is not None]


def parts(network):
    return [*network.parameters(), *network.buffers()]


def test_rewards_of_one_clip_share_it_and_it_stays_for_the_other(models):
    first, second = Place(), Place()
    with holding(first):
        score("clipscore")
    with holding(second):
        score("aesthetic")
    (clip,) = (ref(model) for model in first.models.values())
    assert load_clip.misses == 1
    del first
    assert clip() is not None
    del second
    assert clip() is None


def test_without_holders_rewards_keep_their_models(models):
    score("clipscore")
    score("clipscore")
    assert load_clip.misses == 1
    assert any(key[0] is load_clip for key in PROCESS.models)


@every_reward
def test_a_check_before_training_neither_loads_nor_holds(models, name):
    place = Place()
    with holding(place):
        assert make(name).validate(['a "red" cat'], [WANTED]) == []
    assert not place.models
    assert not any(loads())


@pytest.mark.parametrize("version", ["v1", "v2"])
def test_a_check_refuses_a_wrong_head_as_loading_does(models, root, version):
    name = {"v1": "sa_0_4_vit_l_14_linear.pth", "v2": "sac+logos+ava1-l14-linearMSE.pth"}[version]
    path = root / "aesthetic" / name
    kept = path.read_bytes()
    path.write_bytes((root / "aesthetic" / "aesthetic_predictor_v2_5.pth").read_bytes())
    try:
        (problem,) = make_reward("aesthetic", version=version).validate([], [])
        with pytest.raises(ValueError, match=r"lacks|other shapes") as raised:
            score("aesthetic", version=version)
    finally:
        path.write_bytes(kept)
    assert problem == str(raised.value)
