"""The protocol: both backbones are of one shape, and what they return too."""

from __future__ import annotations

import inspect

import pytest

from tidelock.backbone import protocol
from tidelock.backbone.local import LocalBackbone, LocalGeneration, LocalPass
from tidelock.backbone.remote import RemoteBackbone, RemoteGeneration, RemotePass
from tidelock.device.bank import BankPass


@pytest.mark.parametrize(
    ("protocol_class", "made"),
    [
        (protocol.Backbone, LocalBackbone),
        (protocol.Backbone, RemoteBackbone),
        (protocol.Pass, LocalPass),
        (protocol.Pass, RemotePass),
        (protocol.Generation, LocalGeneration),
        (protocol.Generation, RemoteGeneration),
        (protocol.AttemptSites, BankPass),
    ],
)
def test_every_member_is_there_with_the_same_arguments(protocol_class, made):
    members = {name: value for name, value in vars(protocol_class).items() if not name.startswith("_")}
    assert members
    for name, member in members.items():
        if inspect.isfunction(member):
            assert list(inspect.signature(getattr(made, name)).parameters) == list(inspect.signature(member).parameters)
        else:
            assert isinstance(vars(made)[name], type(member))
