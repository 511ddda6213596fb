"""What `transformers serve` imports, once for all servers that are forked from here."""

import transformers.cli.serve
import transformers.cli.serving.chat_completion
import transformers.cli.serving.server
import transformers.models.idefics3.modeling_idefics3
import transformers.models.idefics3.processing_idefics3  # noqa: F401
