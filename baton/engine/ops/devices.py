"""Which devices are at hand. What Baton knows of a device besides its name is in the catalog."""

from __future__ import annotations

import typing

import torch

from baton.core.config import DeviceName
from baton.core.errors import ConfigError


def find_device(name: str) -> torch.device:
    """The device of that name. ``ConfigError`` where this process has none."""
    if name == "emulated":
        raise ConfigError(
            "device emulated computes nothing: it is for instances of baton serve, or use device "
            "cpu",
            param="device",
        )
    device = torch.device(name)
    if device.type == "cpu":
        return device
    here = torch.accelerator.current_accelerator(check_available=True)
    if here is None or here.type != device.type:
        found = "no accelerator" if here is None else here.type
        raise ConfigError(
            f"device {name} is not there: this machine, as this torch sees it, has {found}; use "
            "device cpu, or install a driver and a torch made for the device",
            param="device",
        )
    return device


def available_devices() -> tuple[torch.device, ...]:
    """Those that Baton knows and this process has; the CPU first."""
    found = []
    for name in typing.get_args(DeviceName):
        try:
            found.append(find_device(name))
        except ConfigError:
            continue
    return tuple(found)
