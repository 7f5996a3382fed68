"""`turbolens completion`."""

from __future__ import annotations

import dataclasses
from typing import Final, Literal

from tyro.conf import Positional

from turbolens.cli import _EXTRAS, _OWN

# What a command takes is what its help says: so those of other distributions are completed too. Asked once in a shell.
_SCRIPT: Final = r"""
declare -gA _turbolens_known
_turbolens_learn() {
    [[ -n ${_turbolens_known[$*]+known} ]] && return
    local help=$(COLUMNS=400 turbolens "$@" --help 2>/dev/null)
    local flags=$(grep -oE -- '--[a-z][a-z-]+' <<<"$help" | sort -u)
    local below=$(grep -m1 -oE '\{[a-z-]+(,[a-z-]+)+\}$' <<<"${help%%$'\n\n'*}")
    _turbolens_known[$*]="${flags//$'\n'/ } ${below//[\{\},]/ }"
}
_turbolens() {
    local current=${COMP_WORDS[COMP_CWORD]} path word
    COMPREPLY=()
    if ((COMP_CWORD == 1)); then
        COMPREPLY=($(compgen -W "@COMMANDS@ --help --version" -- "$current"))
        return
    fi
    path=("${COMP_WORDS[1]}")
    _turbolens_learn "${path[@]}"
    for word in "${COMP_WORDS[@]:2:COMP_CWORD-2}"; do
        if [[ $word =~ ^[a-z][a-z-]*$ && " ${_turbolens_known[${path[*]}]} " == *" $word "* ]]; then
            path+=("$word")
            _turbolens_learn "${path[@]}"
        fi
    done
    COMPREPLY=($(compgen -W "${_turbolens_known[${path[*]}]}" -- "$current"))
    ((${#COMPREPLY[@]})) || COMPREPLY=($(compgen -f -- "$current"))
}
complete -F _turbolens turbolens
"""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Completion:
    """Print what makes a shell complete commands and flags.

    Example: eval "$(turbolens completion bash)"
    """

    shell: Positional[Literal["bash", "zsh"]]
    """Which shell."""

    def run(self) -> None:
        before = "autoload -U +X bashcompinit && bashcompinit" if self.shell == "zsh" else ""
        print((before + _SCRIPT).replace("@COMMANDS@", " ".join((*_OWN, *_EXTRAS))).strip())
