"""Flower's settings: `celery -A tasks flower` reads them from here."""

from __future__ import annotations

# What ran, for what (what the sender chose to show, never a token), and what became of it.
tasks_columns = "name,args,state,result,received,runtime,worker"
# A window, not a control panel.
read_only = True
# Workers send events by themselves, and listen to no remote control.
enable_events = False
# Its own file would be pickled.
persistent = False
