"""How a run came about, in words."""

import pytest

from dvinv.runtime import workdir


@pytest.mark.parametrize(
    ('argv', 'expected'),
    [
        (['/x/dvinv/main.py', '--config', 'configs/digits.py:fast'], 'python -m dvinv.main --config configs/digits.py:fast'),
        (['/usr/bin/dvinv', "--config.tasks=('teacher',)"], "dvinv '--config.tasks=('\"'\"'teacher'\"'\"',)'"),
        (['/y/ipykernel_launcher.py', '-f', 'kernel.json'], ''),
        (['/other/main.py'], ''),
        ([], ''),
    ],
)
def test_the_command_can_be_given_again(monkeypatch, argv, expected):
    monkeypatch.setattr('sys.argv', argv)
    assert workdir.command() == expected


def test_the_packages_are_named():
    assert 'dvinv 0' in workdir.package_text()
    assert 'Python 3.' in workdir.package_text()
