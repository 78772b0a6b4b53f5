"""Tables: keys, their secrets and their limits in the store."""

import sqlalchemy as sa

from gateway.store.revisions import metadata

keys = sa.Table(
    "keys",
    metadata,
    sa.Column("id", sa.String(16), primary_key=True),
    sa.Column("name", sa.String(200), nullable=False),
    sa.Column("owner", sa.String(200), nullable=False),
    sa.Column("created_at", sa.BigInteger, nullable=False),
    sa.Column("expires_at", sa.BigInteger),
    sa.Column("disabled", sa.Boolean, nullable=False),
    sa.Column("models", sa.JSON(none_as_null=True)),  # null: all
    sa.Column("limits", sa.JSON, nullable=False),
    sa.Column("priority", sa.Integer, nullable=False),
    sa.Column("labels", sa.JSON, nullable=False),
    sa.Column("signing", sa.String(200)),  # the secret that proves its users; null: it does not tell them apart
    sa.Column("user_limits", sa.JSON(none_as_null=True)),  # of each user; null: none
    sa.Index("keys_by_age", "created_at", "id"),
)
secrets = sa.Table(
    "secrets",
    metadata,
    sa.Column("digest", sa.String(64), primary_key=True),
    sa.Column("key_id", sa.String(16), sa.ForeignKey("keys.id", ondelete="CASCADE"), nullable=False),
    sa.Column("created_at", sa.BigInteger, nullable=False),
    sa.Column("expires_at", sa.BigInteger),  # null: it ends with its key
    sa.Index("secrets_key", "key_id"),
)

# The names of deleted keys, for their usage.
deleted_keys = sa.Table(
    "deleted_keys",
    metadata,
    sa.Column("id", sa.String(16), primary_key=True),
    sa.Column("name", sa.String(200), nullable=False),
)

# The limits of keys that have none of their own. For a limit without a row, the setting applies.
default_limits = sa.Table(
    "default_limits",
    metadata,
    sa.Column("name", sa.String(32), primary_key=True),
    sa.Column("value", sa.BigInteger, nullable=False),
)
