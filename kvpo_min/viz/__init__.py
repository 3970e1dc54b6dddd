"""Pictures of runs: each function returns a matplotlib `Figure`, a Pillow image or a notebook player, and keeps no
state.

Figures are made without pyplot, so nothing leaks from one cell or test to the next. Branches have the same colours
everywhere (Okabe and Ito's, safe for colour-blind readers), the anchor is grey, and what a frame is to a branch has a
hatch too. Videos are tensors [..., T, 3, H, W], RGB in [0, 1]; several videos have N in front, and in a group the
anchor is the last. matplotlib, Pillow and mediapy are imported where they are used: importing this file costs torch
only.
"""

from kvpo_min.viz.film import *  # noqa: F403
from kvpo_min.viz.run import *  # noqa: F403
from kvpo_min.viz.style import *  # noqa: F403
from kvpo_min.viz.video import *  # noqa: F403
