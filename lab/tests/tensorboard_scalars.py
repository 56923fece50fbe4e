"""The scalars of a run's event files as TensorBoard itself reads them: JSON, {tag: [[step, value], ...]}.

tensorboard_scalars.py DIRECTORY        (pip install tensorboard)
"""

import json
import sys

from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

events = EventAccumulator(sys.argv[1], size_guidance={"scalars": 0})  # 0: all of them
events.Reload()
print(json.dumps({tag: [[e.step, e.value] for e in events.Scalars(tag)] for tag in events.Tags()["scalars"]}))
