"""Idempotency: a POST that is repeated with the same `Idempotency-Key` gets the one answer, made once.

The answer is written to a file as it is made (`making`, `file`). Every client that asks for it, the first one included,
reads from there (`reader`): from its beginning, at its own pace, on any worker, while it runs and for a stated time
after. So a client whose connection is cut comes back and has the whole of it; the engine worked once, and the key is
billed once. `answers` brings the two together, and `space` bounds what all files may take.

Whoever makes an answer holds a lock on its file. One whose maker was killed is seen by the lock's being free: then
whoever reads it becomes its maker, and goes on (`relay.trail`).
"""
