"""What a training saves, and with ``--push_to_hub`` uploads, which is the model and nothing else of its folder."""

from __future__ import annotations

from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

from transformers import Trainer

from rrhf.common.hub import hub_client
from rrhf.models.folders import MODEL_FILES, open_to_readers


class SavingTrainer(Trainer):
    """A ``transformers.Trainer`` whose weights others may read, and that uploads the model once, at the end.

    transformers' own uploads the whole folder, with every checkpoint anew: settings with local paths, windows of OP-k
    and watched answers, which are training data.
    """

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        super()._save(output_dir, state_dict)
        if self.args.should_save:  # all processes are asked, and one writes
            open_to_readers(Path(output_dir or str(self.args.output_dir)))

    def init_hf_repo(self, token: str | None = None, private: bool | None = None) -> None:
        """Make the repository, before anything is trained.

        Raises:
            UserError: as ``hub_client``.
        """
        if self.is_world_process_zero():
            with self._hub(token):
                super().init_hf_repo(token=token, private=private)

    def _hub(self, token: str | None) -> AbstractContextManager[Any]:
        """The client for the repository, which takes its name from the folder where none is given."""
        name = self.hub_model_id or self.args.hub_model_id or Path(str(self.args.output_dir)).absolute().name
        return hub_client(name, "--hub_model_id", token)

    def push_to_hub(
        self,
        commit_message: str | None = "End of training",
        blocking: bool = True,
        token: str | None = None,
        revision: str | None = None,
        private: bool | None = None,
        **kwargs: Any,
    ) -> Any:
        """Save the model and upload its files, without transformers' draft of a card."""
        if self.hub_model_id is None:
            self.init_hf_repo(token=token, private=private)
        self.save_model(_internal_call=True)
        if not self.is_world_process_zero():
            return None
        with self._hub(token) as api:
            return api.upload_folder(
                repo_id=self.hub_model_id,
                folder_path=self.args.output_dir,
                commit_message=commit_message,
                run_as_future=not blocking,
                allow_patterns=MODEL_FILES,
                ignore_patterns=["*/*"],
                revision=revision or self.args.hub_revision,
            )

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        """Checkpoints stay here."""
