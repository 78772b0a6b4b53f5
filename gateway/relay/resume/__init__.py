"""Resume: continue an answer whose engine died, so that its client gets one whole answer.

- `part`: what has come of one choice, and what its request allows.
- `search`: which engine continues the answer.
- `handover`: in which ways an engine can continue, and what it is asked.
- `trials`: how the models of an engine were seen to continue.
- `seam`: make one stream of the two.
- `splice`: what of the second stream the client lacks: text, tool calls, log probabilities.
"""
