"""The service over real sockets: who may call, what is refused and how, and that no pass disturbs another."""

from __future__ import annotations

import logging
import threading
from types import SimpleNamespace

import grpc
import pytest
import torch
from grpc_health.v1 import health_pb2, health_pb2_grpc

from tests.support.sites import attn
from tests.unit.hand_device import (
    PROJECTIONS,
    SITE_WIDTH,
    TOKEN,
    WIDTH,
    HandDevice,
    HandPass,
    an_active_site,
    wait_until,
)
from tidelock.cloud import service as service_module
from tidelock.cloud.memory import bytes_at_sites
from tidelock.cloud.service import BackboneService, Limits
from tidelock.errors import WireError
from tidelock.model.cut import BlockCall
from tidelock.wire import tidelock_pb2 as pb
from tidelock.wire.codec import Codec
from tidelock.wire.limits import PASS_SECONDS, PROTOCOL_VERSION

pytestmark = pytest.mark.timeout(120)


@pytest.fixture(scope="module")
def cloud(start_cloud):
    """A cloud with one engine, so that a pass which does not let go of it is noticed."""
    return start_cloud(Limits(max_sessions=1))


@pytest.fixture
def device(cloud, hand_device):
    return hand_device(cloud)


@pytest.fixture
def undisturbed(cloud):
    """Check, after the test, that the cloud works for others as if nothing had been."""
    yield
    wait_until(cloud.is_idle, "an idle cloud")
    other = HandDevice(cloud, TOKEN + "-of-boris")
    try:
        run = other.begin()
        run.forward()
        assert run.backward() > 0
    finally:
        other.close()
    wait_until(cloud.is_idle, "an idle cloud")


def refusal(run: HandPass):
    error = run.error()
    return error.code(), error.details()


def test_a_whole_training_pass(device, undisturbed):
    run = device.begin()
    run.forward()
    assert run.backward() > 0


def test_only_the_selected_states_come_back(device, undisturbed):
    run = device.begin()
    run.open(mode=pb.EVALUATE, active=[], selected=[2, 5, 7])
    run.send("embedding", 8, WIDTH)
    assert run.receive("final_state", 3, WIDTH).shape == (3, WIDTH)
    assert next(run.call, None) is None


def test_taps_come_before_the_final_state(device, undisturbed):
    run = device.begin()
    run.open(mode=pb.EVALUATE, active=[], selected=[7], taps=pb.Taps(blocks=[0, 2]))
    run.send("embedding", 8, WIDTH)
    for block in (0, 2):
        run.receive("tap", 8, WIDTH, block=block)
    run.receive("final_state", 1, WIDTH)
    assert next(run.call, None) is None


def test_taps_of_a_generation_are_of_each_new_token(device, undisturbed):
    run = device.begin()
    run.open(mode=pb.GENERATE, active=[], selected=[7], taps=pb.Taps(blocks=[1], width=5))
    run.send("embedding", 8, WIDTH)
    tokens = 8
    for _ in range(3):
        run.receive("tap", tokens, 5, block=1)
        run.receive("final_state", 1, WIDTH)
        tokens = 1
        run.send("embedding", 1, WIDTH)
    run.leave()


def test_a_device_that_leaves_among_its_taps_takes_nothing_with_it(device, undisturbed):
    run = device.begin()
    run.open(mode=pb.EVALUATE, active=[], taps=pb.Taps(blocks=[0, 1, 2]))
    run.send("embedding", 8, WIDTH)
    run.receive("tap", 8, WIDTH, block=0)
    run.leave()


def test_generation_goes_on_until_the_device_leaves(device, undisturbed):
    run = device.begin()
    run.open(mode=pb.GENERATE, active=[an_active_site(1, ("v_proj",))], selected=[7])
    run.send("embedding", 8, WIDTH)
    tokens, selected = 8, 1
    for _ in range(4):
        run.receive("site_input", tokens, WIDTH, block=1)
        run.send("site_output", tokens, 16, block=1)
        run.receive("final_state", selected, WIDTH)
        tokens = selected = 1
        run.send("embedding", 1, WIDTH)
    run.leave()


def test_generation_ends_with_the_models_positions(device, undisturbed):
    run = device.begin()
    run.open(mode=pb.GENERATE, active=[], lengths=[63], width=63, selected=[62])
    run.send("embedding", 63, WIDTH)
    run.receive("final_state", 1, WIDTH)
    run.send("embedding", 1, WIDTH)
    run.receive("final_state", 1, WIDTH)
    assert next(run.call, None) is None


def all_of(answer):
    return answer if isinstance(answer, pb.Description | pb.ScheduleCommand) else list(answer)


@pytest.mark.parametrize("metadata", [(), (("authorization", "Bearer "),), (("authorization", f"Bearer {TOKEN}x"),)])
@pytest.mark.parametrize("method", ["Describe", "Fetch", "Pass", "Decide"])
def test_no_method_answers_without_a_known_token(device, method, metadata, caplog):
    argument = {
        "Describe": pb.DescribeRequest(),
        "Fetch": pb.FetchRequest(name="config.json"),
        "Pass": iter([]),
        "Decide": pb.NormReport(),
    }
    ask = getattr(device.stub, method)
    with pytest.raises(grpc.RpcError) as caught:
        all_of(ask(argument[method], metadata=metadata, timeout=10))
    assert caught.value.code() == grpc.StatusCode.UNAUTHENTICATED
    assert "Token: expected one that this cloud knows" in str(caught.value.details())
    assert TOKEN not in str(caught.value.details())
    assert TOKEN not in caplog.text


def test_health_is_told_to_everybody(device):
    stub = health_pb2_grpc.HealthStub(device.channel)
    for name in ("", "tidelock.v1.Backbone"):
        answer = stub.Check(health_pb2.HealthCheckRequest(service=name), timeout=10)
        assert answer.status == health_pb2.HealthCheckResponse.SERVING


def test_the_description_is_of_the_model(cloud, device):
    description = device.stub.Describe(pb.DescribeRequest(), metadata=device.metadata, timeout=10)
    assert (description.model_type, description.num_blocks, description.backbone_dtype) == ("llama", 3, "fp32")
    assert description == cloud.server.description
    assert {artefact.name for artefact in description.files} >= {"config.json", "model.safetensors"}


@pytest.mark.parametrize(
    "name", ["", ".", "../etc/passwd", "/etc/passwd", "..", "config.json/../config.json", "CONFIG.JSON", "a\x00b"]
)
def test_only_described_files_are_given(device, name):
    with pytest.raises(grpc.RpcError) as caught:
        list(device.stub.Fetch(pb.FetchRequest(name=name), metadata=device.metadata, timeout=10))
    assert caught.value.code() == grpc.StatusCode.INVALID_ARGUMENT
    assert "expected a name from the description" in str(caught.value.details())


def test_a_long_name_is_not_repeated_in_full(device):
    with pytest.raises(grpc.RpcError) as caught:
        list(device.stub.Fetch(pb.FetchRequest(name="x" * 100_000), metadata=device.metadata, timeout=10))
    assert len(str(caught.value.details())) < 400


def test_described_files_are_given_whole(cloud, device):
    for artefact in cloud.server.description.files:
        parts = device.stub.Fetch(pb.FetchRequest(name=artefact.name), metadata=device.metadata, timeout=10)
        assert sum(len(part.data) for part in parts) == artefact.size_bytes


@pytest.mark.parametrize("timeout", [None, PASS_SECONDS + 120])
def test_a_stream_without_a_deadline_is_refused(device, undisturbed, timeout):
    run = device.begin(timeout=timeout)
    assert refusal(run) == (
        grpc.StatusCode.INVALID_ARGUMENT,
        "Opening a pass: expected a deadline of at most 600.0 s, got none or a later one. Set one.",
    )


def test_another_model_is_refused(device, undisturbed):
    run = device.begin()
    run.open(fingerprint="f" * 64)
    code, details = refusal(run)
    assert code == grpc.StatusCode.FAILED_PRECONDITION
    assert "expected a model with fingerprint" in details
    assert "f" * 13 not in details


def test_another_protocol_is_refused(device, undisturbed):
    run = device.begin()
    run.open(protocol=PROTOCOL_VERSION + 1)
    assert refusal(run) == (
        grpc.StatusCode.INVALID_ARGUMENT,
        f"Opening a pass: expected protocol {PROTOCOL_VERSION}, got {PROTOCOL_VERSION + 1}. Install one version.",
    )


def send_scales_of_zero(run):
    run.open(activation_codec=pb.INT8)
    data = bytes(Codec.INT8.size_bytes((8, WIDTH)))
    run.outbox.put(pb.DeviceMessage(embedding=pb.TensorPart(codec=pb.INT8, shape=[8, WIDTH], data=data)))


BROKEN = {
    "integers that none wrote": (send_scales_of_zero, "Reading embedding: expected scales from .*, got another"),
    "first message": (lambda run: run.send("embedding", 8, WIDTH), "expected open, got embedding"),
    "open twice": (lambda run: (run.open(), run.open()), "expected embedding, got open"),
    "narrow embedding": (lambda run: (run.open(), run.send("embedding", 8, WIDTH - 1)), r"of shape \(8, 31\)"),
    "answer before the question": (lambda run: (run.open(), run.send("site_output", 8, 64)), "expected embedding"),
    "answer of another block": (
        lambda run: (run.open(), run.send("embedding", 8, WIDTH), run.send("site_output", 8, SITE_WIDTH, block=1)),
        "expected site 0, got site 3",
    ),
    "wide answer": (
        lambda run: (run.open(), run.send("embedding", 8, WIDTH), run.send("site_output", 8, SITE_WIDTH + 1)),
        r"of shape \(8, 65\)",
    ),
    "wrong gradient": (lambda run: (run.forward(), run.send("final_gradient", 7, WIDTH)), r"of shape \(7, 32\)"),
    "input gradient at once": (
        lambda run: (run.forward(), run.send("input_gradient", 8, WIDTH, block=1)),
        "expected final_gradient, got input_gradient",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", BROKEN)
def test_a_broken_protocol_ends_that_pass(device, undisturbed, case, caplog):
    act, message = BROKEN[case]
    run = device.begin()
    act(run)
    error = run.error()
    assert error.code() == grpc.StatusCode.INVALID_ARGUMENT
    with pytest.raises(ValueError, match=message):
        raise ValueError(error.details())
    assert f"Pass of anna refused: {error.details()}" in caplog.text


def leave_at_once(run):
    pass


def leave_before_the_embedding(run):
    run.open()


def leave_in_the_middle_of_the_embedding(run):
    run.open()
    run.outbox.put(
        pb.DeviceMessage(embedding=pb.TensorPart(codec=pb.FP32, shape=[8, WIDTH], data=bytes(8 * WIDTH * 4)))
    )
    run.receive("site_input", 8, WIDTH)


def leave_in_the_middle_of_forward(run):
    run.open()
    run.send("embedding", 8, WIDTH)
    run.receive("site_input", 8, WIDTH)
    run.send("site_output", 8, SITE_WIDTH)
    run.receive("site_input", 8, WIDTH, block=1)


def leave_before_backward(run):
    run.forward()


def leave_in_the_middle_of_backward(run):
    run.forward()
    run.send("final_gradient", 8, WIDTH)
    run.receive("site_gradient", 8, SITE_WIDTH, block=1)


def leave_before_done(run):
    leave_in_the_middle_of_backward(run)
    run.send("input_gradient", 8, WIDTH, block=1)


LEAVE = [
    leave_at_once,
    leave_before_the_embedding,
    leave_in_the_middle_of_the_embedding,
    leave_in_the_middle_of_forward,
    leave_before_backward,
    leave_in_the_middle_of_backward,
    leave_before_done,
]


@pytest.mark.parametrize("phase", LEAVE)
@pytest.mark.parametrize("how", ["cancel", "hang up", "close half"])
def test_a_device_may_leave_at_any_time(cloud, hand_device, undisturbed, phase, how):
    device = hand_device(cloud)
    run = device.begin()
    phase(run)
    if how == "cancel":
        run.call.cancel()
    elif how == "hang up":
        device.channel.close()
    else:
        run.outbox.put(None)


def bytes_of_a_pass(cloud):
    """Return what the pass of `HandPass.forward` keeps."""
    cut = cloud.service._cut
    at_sites = bytes_at_sites(cut.geometry, cut.dtype.itemsize, dict.fromkeys(map(attn, (0, 1)), PROJECTIONS))
    return cloud.service.cost.bytes_for(1, 8, at_sites)


def test_memory_is_reserved_until_the_end_of_the_pass_only(start_cloud, hand_device):
    cloud = start_cloud(Limits(max_memory_bytes=1 << 20))
    run = hand_device(cloud).begin()
    run.forward()
    assert cloud.service._memory._used == bytes_of_a_pass(cloud) > 0
    run.backward()
    wait_until(cloud.is_idle, "an idle cloud")


@pytest.mark.parametrize("error", [ZeroDivisionError("private"), RuntimeError("private"), MemoryError()])
def test_a_fault_in_the_model_ends_that_pass_only(device, undisturbed, monkeypatch, caplog, error):
    def fail(self, hidden_BTD):
        raise error

    with monkeypatch.context() as patch:
        patch.setattr(BlockCall, "__call__", fail)
        run = device.begin()
        run.open()
        run.send("embedding", 8, WIDTH)
        assert refusal(run) == (
            grpc.StatusCode.UNKNOWN,
            f"Computing a pass: expected it to succeed, got {type(error).__name__}.",
        )
    assert "Pass of anna failed." in caplog.text


def test_more_passes_than_engines_wait_and_finish(cloud, hand_device, undisturbed):
    devices = [hand_device(cloud) for _ in range(4)]
    failed = []

    def work(device):
        try:
            for _ in range(3):
                run = device.begin()
                run.forward()
                run.backward()
        except BaseException as error:
            failed.append(error)
            raise

    threads = [threading.Thread(target=work, args=(device,)) for device in devices]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failed == []


@pytest.mark.parametrize("how", ["cancel", "hang up"])
def test_a_waiting_pass_may_leave(cloud, hand_device, undisturbed, how):
    first = hand_device(cloud).begin()
    first.forward()
    device = hand_device(cloud)
    waiting = device.begin()
    waiting.open()
    in_line = cloud.service._engines._work_queue
    wait_until(lambda: not in_line.empty(), "the second pass in line")
    item = in_line.get()
    in_line.put(item)
    if how == "cancel":
        waiting.call.cancel()
    else:
        device.channel.close()
    wait_until(item.future.cancelled, "the second pass out of the line")
    assert first.backward() > 0


def test_what_can_never_fit_is_refused(start_cloud, hand_device):
    cloud = start_cloud(Limits(max_memory_bytes=1000))
    run = hand_device(cloud).begin()
    run.open()
    code, details = refusal(run)
    assert code == grpc.StatusCode.RESOURCE_EXHAUSTED
    assert "expected it to keep at most 1.0 kB, as --max-memory says, got one of " in details
    evaluating = hand_device(cloud).begin()
    evaluating.open(mode=pb.EVALUATE, active=[])
    evaluating.send("embedding", 8, WIDTH)
    evaluating.receive("final_state", 8, WIDTH)
    wait_until(cloud.is_idle, "an idle cloud")


def test_what_does_not_fit_now_waits(start_cloud, hand_device):
    cloud = start_cloud(Limits(max_sessions=4, max_memory_bytes=bytes_of_a_pass(start_cloud())))
    first, second, third = (hand_device(cloud).begin() for _ in range(3))
    first.forward()
    second.open()
    third.open()
    wait_until(lambda: len(cloud.service._memory._line) == 2, "both others in line")
    third.leave()
    first.backward()
    second.send("embedding", 8, WIDTH)
    for block in (0, 1):
        second.receive("site_input", 8, WIDTH, block=block)
        second.send("site_output", 8, SITE_WIDTH, block=block)
    second.receive("final_state", 8, WIDTH)
    second.backward()
    wait_until(cloud.is_idle, "an idle cloud")


def test_a_tenant_that_waits_for_its_device_does_not_hold_the_others_up(start_cloud, hand_device):
    cloud = start_cloud(Limits(max_sessions=2))
    slow = hand_device(cloud).begin()
    slow.open()
    slow.send("embedding", 8, WIDTH)
    slow.receive("site_input", 8, WIDTH)
    quick = hand_device(cloud).begin()
    quick.forward()
    quick.backward()
    slow.leave()
    wait_until(cloud.is_idle, "an idle cloud")


def test_passes_at_once_do_not_mix(start_cloud, hand_device):
    cloud = start_cloud(Limits(max_sessions=2))
    runs = [hand_device(cloud).begin() for _ in range(2)]
    for run in runs:
        run.open(mode=pb.EVALUATE, active=[an_active_site(0)])
    for run in runs:
        run.send("embedding", 8, WIDTH)
    for run in runs:
        run.receive("site_input", 8, WIDTH)
    for run in runs:
        run.send("site_output", 8, SITE_WIDTH)
    first, second = (run.receive("final_state", 8, WIDTH) for run in runs)
    assert torch.equal(first, second)


def test_finished_passes_are_counted_and_others_not(start_cloud, hand_device):
    counted = []
    metrics = SimpleNamespace(count_pass=lambda *numbers: counted.append(numbers))
    cloud = start_cloud(metrics=metrics)
    device = hand_device(cloud)
    run = device.begin()
    run.forward()
    seconds = run.backward()
    broken = device.begin()
    broken.open(protocol=0)
    broken.error()
    wait_until(cloud.is_idle, "an idle cloud")
    assert counted == [("anna", 8, seconds)]


def test_debug_logs_name_tenant_and_size_only(device, undisturbed, caplog):
    with caplog.at_level(logging.DEBUG, logger=service_module.__name__):
        run = device.begin()
        run.forward()
        run.backward()
        gone = device.begin()
        gone.forward()
        gone.leave()
        wait_until(lambda: "the device left" in caplog.text, "the second pass logged")
    assert "Pass of anna: 8 tokens" in caplog.text
    assert TOKEN not in caplog.text


class RpcThatIsOver:
    """A call that ends while its pass is put in line: gRPC takes no callback for it."""

    def invocation_metadata(self):
        return (("authorization", f"Bearer {TOKEN}"),)

    def time_remaining(self):
        return 1.0

    def add_callback(self, _callback):
        return False


def test_a_call_that_is_over_before_it_waits_ends(cloud, device, undisturbed):
    holder = device.begin()
    holder.forward()
    assert isinstance(cloud.service, BackboneService)
    assert list(cloud.service.Pass(iter([]), RpcThatIsOver())) == []  # type: ignore[arg-type]
    holder.leave()


class RpcWithoutDeadline(RpcThatIsOver):
    """A call of which gRPC knows no deadline, and whose refusal does not end the method by itself."""

    def __init__(self):
        self.aborted = []

    def time_remaining(self):
        return None

    def abort(self, code, details):
        self.aborted.append((code, details))


def test_a_refusal_ends_the_method_whatever_grpc_does(cloud, undisturbed):
    context = RpcWithoutDeadline()
    with pytest.raises(WireError, match="expected a deadline"):
        list(cloud.service.Pass(iter([]), context))
    assert [code for code, _ in context.aborted] == [grpc.StatusCode.INVALID_ARGUMENT]


def ask(device, **changes):
    """Ask for a decision; return the command, or the refusal."""
    modules = [pb.ModuleNorm(block=block, active=True, norm=block, last_active=0) for block in range(3)]
    rule = pb.ScheduleRule(name="kill-revive", budget=2, warm_up=1, exchange=0.25)
    values = {"protocol": PROTOCOL_VERSION, "fingerprint": device.cloud.fingerprint, "rule": rule, "modules": modules}
    try:
        return device.stub.Decide(pb.NormReport(**{**values, **changes}), metadata=device.metadata, timeout=10)
    except grpc.RpcError as error:
        return error.code(), error.details()


def test_the_scheduler_answers_norms(device, undisturbed):
    assert ask(device) == pb.ScheduleCommand(period=0, kill=[0])


@pytest.mark.parametrize(
    ("changes", "code", "said"),
    [
        (
            {"protocol": PROTOCOL_VERSION - 1},
            grpc.StatusCode.INVALID_ARGUMENT,
            f"Deciding: expected protocol {PROTOCOL_VERSION}, got",
        ),
        ({"fingerprint": "0" * 64}, grpc.StatusCode.FAILED_PRECONDITION, "Deciding: expected a model with fingerprint"),
        ({"modules": []}, grpc.StatusCode.INVALID_ARGUMENT, "Reading norms: "),
        ({"rule": None}, grpc.StatusCode.INVALID_ARGUMENT, "Reading norms: Schedule's name"),
    ],
)
def test_norms_that_cannot_be_answered(device, undisturbed, changes, code, said):
    answered = ask(device, **changes)
    assert answered[0] == code
    assert answered[1].startswith(said)


def test_a_tenant_has_as_many_active_modules_as_its_operator_says(start_cloud, hand_device):
    cloud = start_cloud(Limits(max_active=2))
    cloud.service._tenants.max_active["boris"] = 1
    for token, most, killed in ((TOKEN, 2, [0]), (TOKEN + "-of-boris", 1, [0, 1])):
        device = hand_device(cloud, token)
        assert device.stub.Describe(pb.DescribeRequest(), metadata=device.metadata).max_active == most
        assert ask(device) == pb.ScheduleCommand(period=0, kill=killed, max_active=most)
        sites = [an_active_site(block) for block in range(most + 1)]
        run = device.begin()
        run.open(active=sites)
        code, said = refusal(run)
        assert code == grpc.StatusCode.RESOURCE_EXHAUSTED
        assert f"expected at most {most} active modules in training" in said
        # What is not training asks for whatever was trained.
        run = device.begin()
        run.open(mode=pb.EVALUATE, active=sites[:most])
        run.leave()
        wait_until(cloud.is_idle, "an idle cloud")
