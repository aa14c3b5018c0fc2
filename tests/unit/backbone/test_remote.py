"""The blocks in a cloud: a lost stream costs a repeat and changes no bit, and what is final is not tried again."""

from __future__ import annotations

import gc
import time
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import grpc
import pytest
import torch
from transformers import AutoModelForCausalLM

from tests.support.sites import attn
from tests.unit.hand_device import BLOCKS, PROJECTIONS, SITE_WIDTH, TOKEN, WIDTH, wait_until
from tidelock.backbone import patience
from tidelock.backbone.connection import Connection
from tidelock.backbone.local import LocalBackbone
from tidelock.backbone.pass_times import TimeSplit
from tidelock.backbone.remote import RemoteBackbone
from tidelock.cloud.service import Limits, add_service
from tidelock.errors import (
    CloudUnreachable,
    ConfigError,
    ModelMismatch,
    NonFiniteError,
    TidelockError,
    TokenRefused,
    WireError,
)
from tidelock.model.cut import CutModel
from tidelock.model.rows import Rows
from tidelock.model.walk import Batch
from tidelock.schedule.decide import decide
from tidelock.schedule.schedule import ModuleScore, Schedule, ScoreTable
from tidelock.wire import tidelock_pb2 as pb
from tidelock.wire import tidelock_pb2_grpc as pb_grpc
from tidelock.wire.address import Address
from tidelock.wire.channel import Credentials
from tidelock.wire.codec import Codec, Codecs
from tidelock.wire.egress import Egress
from tidelock.wire.ledger import Kind, Ledger

pytestmark = pytest.mark.timeout(120)

ACTIVE = {attn(0): PROJECTIONS, attn(2): ("q_proj", "v_proj")}


class FlakyCloud(pb_grpc.BackboneServicer):
    """A real cloud whose streams can be broken after so many messages."""

    address: Address

    def __init__(self, service):
        self.service = service
        self.faults = []
        self.passes = 0
        self.before_fault = lambda: None
        self.commands = []

    def Decide(self, request, context):  # noqa: N802
        command = self.commands.pop(0) if self.commands else None
        if isinstance(command, grpc.StatusCode):
            context.abort(command, "broken by the test")
        return command or self.service.Decide(request, context)

    def Describe(self, request, context):  # noqa: N802
        return self.service.Describe(request, context)

    def Pass(self, request_iterator, context):  # noqa: N802
        self.passes += 1
        after, fault = self.faults.pop(0) if self.faults else (None, None)
        for number, message in enumerate(self.service.Pass(request_iterator, context)):
            if number == after:
                self.before_fault()
                if isinstance(fault, grpc.StatusCode):
                    context.abort(fault, "broken by the test")
                if fault is None:
                    return
                yield fault.SerializeToString()
            yield message


class Clock:
    """Stands for the time module; sleeping moves it on."""

    def __init__(self):
        self.now = 1000.0
        self.slept = []

    def monotonic(self):
        return self.now

    def sleep(self, seconds):
        self.slept.append(seconds)
        self.now += seconds


@pytest.fixture(autouse=True)
def clock(monkeypatch):
    clock = Clock()
    monkeypatch.setattr(patience, "time", SimpleNamespace(monotonic=clock.monotonic, sleep=clock.sleep))
    return clock


@pytest.fixture(scope="module")
def cloud(start_cloud):
    return start_cloud(Limits(max_sessions=1))


@pytest.fixture
def flaky(cloud):
    """A breakable cloud, which must be idle after every test."""
    server, servicer = grpc.server(ThreadPoolExecutor(8)), FlakyCloud(cloud.service)
    add_service(servicer, server)
    servicer.address = Address("127.0.0.1", server.add_insecure_port("127.0.0.1:0"), tls=False)
    server.start()
    yield servicer
    wait_until(cloud.is_idle, "an idle cloud")
    server.stop(0).wait()


@pytest.fixture
def connect(cloud):
    """Return a function that makes a backbone; its connections are closed at the end."""
    backbones = []

    def make(flaky, **options):
        connection = Connection(flaky.address, Credentials(TOKEN), Egress(Ledger()), **options)
        backbones.append(RemoteBackbone(connection, cloud.server.geometry))
        return backbones[-1]

    yield make
    for backbone in backbones:
        backbone.close()


class LinearSites:
    """Answers with fixed matrices, and remembers every gradient that it is given."""

    def __init__(self, active=None):
        generator = torch.Generator().manual_seed(3)
        self.matrices = {
            block: torch.randn(WIDTH, SITE_WIDTH if len(names) == 3 else 48, generator=generator) * 0.1
            for block, names in (active or ACTIVE).items()
        }
        self.begun = 0
        self.inputs = {}
        self.gradients = {}

    def begin(self):
        self.begun += 1
        self.inputs.clear()
        self.gradients.clear()
        return self

    def forward(self, block, x_ND):
        self.inputs[block] = x_ND = x_ND.float()
        return x_ND @ self.matrices[block]

    def backward(self, block, grad_NW, *, need_input):
        grad_NW = grad_NW.float()
        self.gradients[block] = self.inputs[block].T @ grad_NW
        return grad_NW @ self.matrices[block].T if need_input else None


def a_batch(*, training=True, active=None, seed=0):
    """Return two rows, one shorter, of which three states are wanted."""
    rows = Rows((0, 0), (6, 4), 6)
    generator = torch.Generator().manual_seed(5)
    embeddings = torch.randn(10, WIDTH, generator=generator)
    return Batch(embeddings, rows, torch.tensor([2, 5, 9]), ACTIVE if active is None else active, training, seed)


GRADIENT = torch.linspace(-1, 1, 3 * WIDTH).view(3, WIDTH)


def step(backbone, sites, seed=0):
    """Return final states and site gradients of a whole pass."""
    run = backbone.forward(a_batch(seed=seed), sites)
    run.backward(GRADIENT)
    return run.final_MD, dict(sites.gradients)


@pytest.fixture(scope="module")
def reference(tiny_folder):
    """What the same pass gives in this process."""
    model = AutoModelForCausalLM.from_pretrained(tiny_folder, dtype=torch.float32)
    return step(LocalBackbone(CutModel(model)), LinearSites())


def equal(left, right):
    return torch.equal(left[0], right[0]) and all(
        torch.equal(left[1][block], right[1][block]) for block in left[1].keys() | right[1].keys()
    )


def test_a_pass_in_the_cloud_is_the_pass_here(flaky, connect, reference):
    backbone = connect(flaky)
    assert equal(step(backbone, LinearSites()), reference)
    assert set(reference[1]) == {attn(0), attn(2)}
    split = backbone.take_times()
    assert split.cloud > 0
    # On a busy machine all of what was waited for may have been computing.
    assert split.wire >= 0
    assert split.waiting >= 0
    assert backbone.take_times() == TimeSplit()
    assert backbone.geometry.num_blocks == BLOCKS


# site_input, site_input, final_state, site_gradient, site_gradient, done
@pytest.mark.parametrize("after", range(6))
@pytest.mark.parametrize("fault", [grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.CANCELLED, None])
def test_a_broken_stream_costs_a_repeat_and_changes_no_bit(flaky, connect, reference, after, fault):
    flaky.faults = [(after, fault)]
    sites = LinearSites()
    assert equal(step(connect(flaky), sites), reference)
    assert (flaky.passes, sites.begun) == (2, 3)


def test_several_broken_streams_too(flaky, connect, reference, clock):
    flaky.faults = [(after, grpc.StatusCode.UNAVAILABLE) for after in (0, 1, 4, 3, 2, 5)]
    assert equal(step(connect(flaky), LinearSites()), reference)
    assert flaky.passes == 7
    assert clock.slept == [0.2, 0.4, 0.2, 0.4, 0.8, 1.6]


def test_patience_ends(flaky, connect, clock, caplog):
    flaky.faults = [(0, grpc.StatusCode.UNAVAILABLE)] * 100
    with pytest.raises(CloudUnreachable, match="broken by the test"):
        connect(flaky, patience_seconds=20).forward(a_batch(), LinearSites())
    assert clock.slept == [0.2, 0.4, 0.8, 1.6, 3.2, 5.0, 5.0]
    assert flaky.passes == 8
    assert caplog.text.count("Trying again") == 7
    assert TOKEN not in caplog.text


def test_without_patience_nothing_is_repeated(flaky, connect):
    flaky.faults = [(0, grpc.StatusCode.UNAVAILABLE)]
    with pytest.raises(CloudUnreachable):
        connect(flaky, patience_seconds=0).forward(a_batch(), LinearSites())
    assert flaky.passes == 1


def test_a_long_pass_has_not_used_up_the_patience(flaky, connect, reference, clock):
    def long_after():
        clock.now += 300

    flaky.before_fault = long_after
    flaky.faults = [(2, grpc.StatusCode.UNAVAILABLE)]
    assert equal(step(connect(flaky, patience_seconds=10), LinearSites()), reference)


FINAL = {
    grpc.StatusCode.UNAUTHENTICATED: TokenRefused,
    grpc.StatusCode.FAILED_PRECONDITION: ModelMismatch,
    grpc.StatusCode.RESOURCE_EXHAUSTED: ConfigError,
    grpc.StatusCode.OUT_OF_RANGE: NonFiniteError,
    grpc.StatusCode.INVALID_ARGUMENT: WireError,
    grpc.StatusCode.UNKNOWN: WireError,
}


@pytest.mark.parametrize("status", FINAL, ids=lambda status: status.name)
@pytest.mark.parametrize("after", [0, 4])
def test_final_errors_are_not_repeated(flaky, connect, status, after):
    flaky.faults = [(after, status)]
    with pytest.raises(TidelockError) as caught:
        step(connect(flaky), LinearSites())
    assert type(caught.value) is FINAL[status]
    assert isinstance(caught.value.__cause__, grpc.RpcError)
    assert flaky.passes == 1


@pytest.mark.parametrize("after", range(6))
def test_a_cloud_that_breaks_the_protocol_is_not_asked_again(flaky, connect, after):
    odd = pb.CloudMessage(done=pb.Done()) if after < 5 else pb.CloudMessage(final_state=pb.TensorPart())
    flaky.faults = [(after, odd)]
    with pytest.raises(WireError, match=r"Reading from the cloud: expected .*, got (done|final_state)"):
        step(connect(flaky), LinearSites())
    assert flaky.passes == 1


@pytest.mark.parametrize(
    "part",
    [
        pb.TensorPart(site=0, codec=pb.FP32, shape=[11, WIDTH], data=bytes(11 * WIDTH * 4)),
        pb.TensorPart(site=0, codec=pb.FP32, shape=[2**31, 2**31], data=bytes(8)),
        pb.TensorPart(site=1, codec=pb.FP32, shape=[10, WIDTH], data=bytes(10 * WIDTH * 4)),
        pb.TensorPart(site=0, codec=pb.BF16, shape=[10, WIDTH], data=bytes(10 * WIDTH * 2)),
    ],
    ids=["rows", "huge", "block", "codec"],
)
def test_a_tensor_that_is_not_the_expected_one_is_refused(flaky, connect, part):
    flaky.faults = [(0, pb.CloudMessage(site_input=part))]
    with pytest.raises(WireError, match="Reading site_input"):
        connect(flaky).forward(a_batch(), LinearSites())


def test_what_the_cloud_gives_too_much_is_never_read(flaky, connect, reference):
    backbone = connect(flaky)
    run = backbone.forward(a_batch(), LinearSites())
    run.close()
    run.close()  # harmless
    assert equal(step(backbone, LinearSites()), reference)


def test_evaluation_needs_no_site_and_no_backward(flaky, connect, tiny_folder):
    batch = a_batch(training=False, active={})
    run = connect(flaky).forward(batch, LinearSites())
    local = LocalBackbone(CutModel(AutoModelForCausalLM.from_pretrained(tiny_folder, dtype=torch.float32)))
    assert torch.equal(run.final_MD, local.forward(batch, LinearSites()).final_MD)


def test_all_states_can_be_asked_for(flaky, connect):
    batch = a_batch(training=False)
    every = Batch(batch.embeddings_NE, batch.rows, torch.arange(10), ACTIVE, training=False)
    backbone = connect(flaky)
    some = backbone.forward(batch, LinearSites()).final_MD
    assert torch.equal(backbone.forward(every, LinearSites()).final_MD[[2, 5, 9]], some)


@pytest.mark.parametrize(("codec", "allowed"), [("bf16", 0.05), ("int8", 0.15), ("int4", 0.9)])
def test_the_codec_is_used_both_ways(flaky, connect, reference, codec, allowed):
    totals = {}
    for name in ("fp32", codec):
        backbone = connect(flaky, codecs=Codecs.named(name))
        states, gradients = step(backbone, LinearSites())
        totals[name] = backbone.connection.egress.ledger.totals()
    assert states.dtype == (torch.bfloat16 if codec == "bf16" else torch.float32)
    assert 0 < relative_error(states, reference[0]) < allowed
    assert 0 < relative_error(gradients[attn(0)], reference[1][attn(0)]) < allowed
    ratio = Codec(codec).ratio([WIDTH])  # framing apart
    for direction in ("sent", "received"):
        for kind in totals["fp32"][direction].keys() - {"control"}:
            assert totals[codec][direction][kind] == pytest.approx(totals["fp32"][direction][kind] / ratio, abs=50)


def relative_error(got, exact):
    return float((got.float() - exact).norm() / exact.norm())


def test_the_ledger_holds_the_stated_bytes(flaky, connect):
    backbone = connect(flaky, codecs=Codecs.named("int4", "int8"))
    step(backbone, LinearSites())
    totals = backbone.connection.egress.ledger.totals()
    bytes_by_kind = {**totals["sent"], **totals["received"]}
    expected = {
        "embedding": [Codec.INT4.size_bytes((10, WIDTH))],
        "site_input": [Codec.INT4.size_bytes((10, WIDTH))] * 2,
        "site_output": [Codec.INT4.size_bytes((10, width)) for width in (SITE_WIDTH, 48)],
        "final_state": [Codec.INT4.size_bytes((3, WIDTH))],
        "final_gradient": [Codec.INT8.size_bytes((3, WIDTH))],
        "site_gradient": [Codec.INT8.size_bytes((10, width)) for width in (SITE_WIDTH, 48)],
        "input_gradient": [Codec.INT8.size_bytes((10, WIDTH))],
    }
    assert bytes_by_kind.keys() - {"control"} == expected.keys()
    for kind, sizes in expected.items():
        # Around the data of a part: its block, codec, shape and lengths.
        assert sum(sizes) < bytes_by_kind[kind] <= sum(sizes) + 20 * len(sizes), kind


def test_gradients_have_a_codec_of_their_own(flaky, connect, reference):
    exact = step(connect(flaky, codecs=Codecs.named("fp32", "int8")), LinearSites())
    assert torch.equal(exact[0], reference[0])
    assert not torch.equal(exact[1][attn(0)], reference[1][attn(0)])
    rounded = step(connect(flaky, codecs=Codecs.named("int8", "fp32")), LinearSites())
    assert not torch.equal(rounded[0], reference[0])


STOCHASTIC = Codecs.named("int8", "int4", stochastic_rounding=True)


def test_stochastic_rounding_follows_the_seed_of_the_pass_and_is_only_for_gradients(flaky, connect):
    backbone = connect(flaky, codecs=STOCHASTIC)
    first, second = (step(backbone, LinearSites(), seed) for seed in (1, 2))
    assert torch.equal(first[0], second[0])
    # Both ends draw: the highest site's gradient was rounded by the cloud last, the lowest one's by both.
    assert not any(torch.equal(first[1][block], second[1][block]) for block in first[1])
    assert equal(step(backbone, LinearSites(), 1), first)


@pytest.mark.parametrize("after", range(6))
def test_a_repeat_rounds_alike_at_both_ends(flaky, connect, after):
    backbone = connect(flaky, codecs=STOCHASTIC)
    expected = step(backbone, LinearSites())
    flaky.faults = [(after, grpc.StatusCode.UNAVAILABLE)]
    assert equal(step(backbone, LinearSites()), expected)
    assert flaky.passes == 3


def test_stochastic_gradients_are_right_on_average(flaky, connect, reference):
    backbone = connect(flaky, codecs=Codecs.named("fp32", "int4", stochastic_rounding=True))
    nearest = step(connect(flaky, codecs=Codecs.named("fp32", "int4")), LinearSites())[1][attn(2)]
    drawn = torch.stack([step(backbone, LinearSites(), seed)[1][attn(2)] for seed in range(60)])
    assert relative_error(drawn.mean(0), reference[1][attn(2)]) < 0.5 * relative_error(nearest, reference[1][attn(2)])


@pytest.mark.parametrize("bad", [float("inf"), float("nan")])
def test_what_is_not_finite_does_not_leave_as_an_integer(flaky, connect, bad):
    class Damaged(LinearSites):
        def forward(self, block, x_ND):
            return super().forward(block, x_ND).index_fill_(0, torch.tensor([3]), bad)

    with pytest.raises(NonFiniteError, match=r"^Sending a site_output: expected finite numbers"):
        connect(flaky, codecs=Codecs.named("int8")).forward(a_batch(), Damaged())
    assert flaky.passes == 1


def test_a_cloud_that_computes_what_is_not_finite_says_so(flaky, connect):
    class Huge(LinearSites):
        def forward(self, block, x_ND):
            return torch.full((len(x_ND), self.matrices[block].shape[1]), 3e38)

    with pytest.raises(NonFiniteError, match=r"^Cloud at grpc://.*: Sending a \w+: expected finite numbers"):
        connect(flaky, codecs=Codecs.named("int8")).forward(a_batch(), Huge())
    assert flaky.passes == 1


def test_a_cloud_that_sends_no_rows_of_integers_is_not_believed(flaky, connect):
    data = bytes(Codec.INT8.size_bytes((10, WIDTH)))  # scales of zero, which none has
    part = pb.TensorPart(site=0, codec=pb.INT8, shape=[10, WIDTH], data=data)
    flaky.faults = [(0, pb.CloudMessage(site_input=part))]
    with pytest.raises(WireError, match=r"Reading site_input: expected scales from"):
        connect(flaky, codecs=Codecs.named("int8")).forward(a_batch(), LinearSites())
    assert flaky.passes == 1


def test_the_ledger_has_every_kind_and_nothing_for_the_lowest_site(flaky, connect):
    backbone = connect(flaky)
    step(backbone, LinearSites())
    totals = backbone.connection.egress.ledger.totals()
    assert set(totals["sent"]) == {"control", "embedding", "site_output", "final_gradient", "input_gradient"}
    assert set(totals["received"]) == {"control", "site_input", "final_state", "site_gradient"}
    one_tensor = 10 * WIDTH * 4
    # The higher of the two sites only.
    assert one_tensor < totals["sent"][Kind.INPUT_GRADIENT.value] < one_tensor + 64


@pytest.mark.parametrize("error", [ZeroDivisionError, KeyboardInterrupt])
def test_a_fault_on_the_device_frees_the_cloud_at_once(flaky, connect, cloud, error):
    class Faulty(LinearSites):
        def forward(self, block, x_ND):
            raise error

    backbone = connect(flaky)
    with pytest.raises(error) as caught:
        backbone.forward(a_batch(), Faulty())
    wait_until(cloud.is_idle, "an idle cloud")
    assert flaky.passes == 1
    del caught


def test_a_pass_that_is_thrown_away_is_not_kept_in_the_cloud(flaky, connect, cloud):
    run = connect(flaky).forward(a_batch(), LinearSites())
    assert len(cloud.busy) == 1
    del run
    gc.collect()
    wait_until(cloud.is_idle, "an idle cloud")


def test_a_closed_pass_is_run_again_for_its_backward(flaky, connect, reference):
    sites = LinearSites()
    run = connect(flaky).forward(a_batch(), sites)
    run.close()
    run.backward(GRADIENT)
    assert equal((run.final_MD, sites.gradients), reference)


def generating(active=None):
    rows = Rows((0, 2), (6, 4), 6)
    generator = torch.Generator().manual_seed(5)
    embeddings = torch.randn(10, WIDTH, generator=generator)
    return Batch(embeddings, rows, torch.tensor([5, 9]), active or ACTIVE, training=False)


def generate(backbone, tokens=3):
    run = backbone.generate(generating(), LinearSites())
    states = [run.final_BD]
    for number in range(tokens):
        states.append(run.extend(torch.full((2, WIDTH), 0.1 * number)))
        assert torch.equal(states[-1], run.final_BD)
    run.close()
    return torch.stack(states)


def test_generation_in_the_cloud_is_generation_here(flaky, connect, tiny_folder):
    local = LocalBackbone(CutModel(AutoModelForCausalLM.from_pretrained(tiny_folder, dtype=torch.float32)))
    assert torch.equal(generate(connect(flaky)), generate(local))


def test_the_prompt_is_repeated_when_its_stream_breaks(flaky, connect):
    backbone = connect(flaky)
    states = generate(backbone)
    flaky.faults = [(1, grpc.StatusCode.UNAVAILABLE)]
    assert torch.equal(generate(backbone), states)
    assert flaky.passes == 3


@pytest.mark.parametrize("fault", [grpc.StatusCode.UNAVAILABLE, None])
def test_an_answer_that_is_interrupted_ends(flaky, connect, fault):
    flaky.faults = [(4, fault)]
    run = connect(flaky).generate(generating(), LinearSites())
    with pytest.raises(CloudUnreachable):
        run.extend(torch.zeros(2, WIDTH))
    assert flaky.passes == 1
    run.close()
    with pytest.raises(CloudUnreachable, match="stream of this pass is closed"):
        run.extend(torch.zeros(2, WIDTH))


def test_a_cloud_that_comes_back_with_another_model_ends_the_run(flaky, connect):
    backbone = connect(flaky)
    backbone.connection.description.fingerprint = "f" * 64
    with pytest.raises(ModelMismatch, match="The cloud was restarted with other weights"):
        backbone.forward(a_batch(), LinearSites())
    assert flaky.passes == 1


def test_a_cloud_that_is_started_again_is_found(cloud, connect, reference, clock, monkeypatch):
    servicer = FlakyCloud(cloud.service)

    def serve(port):
        server = grpc.server(ThreadPoolExecutor(8), options=[("grpc.so_reuseport", 0)])
        add_service(servicer, server)
        bound = server.add_insecure_port(f"127.0.0.1:{port}")
        server.start()
        return server, bound

    first, port = serve(0)
    servicer.address = Address("127.0.0.1", port, tls=False)
    sites = LinearSites()
    run = connect(servicer).forward(a_batch(), sites)
    first.stop(0).wait()
    servers: list[grpc.Server] = []

    def sleep(seconds):
        if not servers:
            servers.append(serve(port)[0])
        time.sleep(0.2)

    monkeypatch.setattr(clock, "sleep", sleep)
    monkeypatch.setattr(patience, "time", clock)
    run.backward(GRADIENT)
    assert equal((run.final_MD, sites.gradients), reference)
    wait_until(cloud.is_idle, "an idle cloud")
    servers[0].stop(0).wait()


SCHEDULE = Schedule("kill-revive", budget=1)
# After the warm-up: the module of block 1 has moved most.
TABLE = ScoreTable(0, tuple(ModuleScore(block, True, score, 0) for block, score in enumerate((0.5, 0.75, 0.25))))


@pytest.mark.parametrize(
    "schedule",
    [
        SCHEDULE,
        Schedule("kill-revive", budget=2, exchange=0.5, longest_sleep=3),
        Schedule("early-kill", threshold=1.2),
        Schedule("random", budget=2, seed=2**40 + 1),
        Schedule("kill-revive", budget=1, warm_up=2),
    ],
)
def test_the_scheduler_decides_as_the_schedule_says(flaky, connect, schedule):
    backbone = connect(flaky)
    assert backbone.max_active is None
    for period in range(4):
        rows = tuple(ModuleScore(b, b != 2, 0.1 * (b + period) % 0.3, period + 1 - (b == 2)) for b in range(3))
        table = ScoreTable(period + 1, rows)
        assert backbone.decide(schedule, table) == decide(schedule, table)
    totals = backbone.connection.egress.ledger.totals()
    assert totals["sent"].keys() == {"norms"}
    assert totals["received"]["control"] > 0


def test_a_decision_waits_for_a_cloud_that_is_away(flaky, connect, clock):
    flaky.commands = [grpc.StatusCode.UNAVAILABLE] * 2
    assert connect(flaky).decide(SCHEDULE, TABLE).active == (1,)
    assert clock.slept == [0.2, 0.4]
    flaky.commands = [grpc.StatusCode.UNAVAILABLE] * 2
    with pytest.raises(CloudUnreachable):
        connect(flaky, patience_seconds=0.3).decide(SCHEDULE, TABLE)


@pytest.mark.parametrize(
    "command",
    [
        pb.ScheduleCommand(period=0, kill=[0, 1]),
        pb.ScheduleCommand(period=1, kill=[0, 2]),
        pb.ScheduleCommand(period=0, kill=[0, 2], revive=[1]),
        pb.ScheduleCommand(period=0, kill=[0, 2], max_active=0),
        pb.ScheduleCommand(),
    ],
)
def test_a_command_that_the_schedule_does_not_give_is_refused(flaky, connect, command):
    flaky.commands = [command]
    with pytest.raises(WireError, match=r"expected it to kill \[0, 2\] and revive \[\] after period 0, got"):
        connect(flaky).decide(SCHEDULE, TABLE)


def test_norms_that_are_no_numbers_do_not_leave(flaky, connect):
    backbone = connect(flaky)
    report = pb.NormReport(modules=[pb.ModuleNorm(block=0, active=True, norm=float("nan"))])
    with pytest.raises(NonFiniteError, match="got nan for block 0"):
        backbone.connection.egress.norms(report)
    assert (
        "sent" not in backbone.connection.egress.ledger.totals()
        or not backbone.connection.egress.ledger.totals()["sent"]
    )
