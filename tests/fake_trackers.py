"""Stand-ins for wandb and mlflow that only remember what was asked of them."""

import types


class FakeWandb(types.ModuleType):
  """What of wandb is used; `calls` holds what was asked of it."""

  def __init__(self):
    super().__init__("wandb")
    self.calls = []

  def init(self, **options):
    self.calls.append(("init", options))
    return types.SimpleNamespace(
      define_metric=lambda *args, **options: self.calls.append(("define_metric", args, options)),
      log=lambda values: self.calls.append(("log", values)),
      finish=lambda exit_code: self.calls.append(("finish", exit_code)),
    )

  def Image(self, path):
    return ("image", path)


class FakeMlflow(types.ModuleType):
  """What of mlflow is used."""

  def __init__(self):
    super().__init__("mlflow")
    self.calls = []

  def __getattr__(self, name):
    if name.startswith("__"):
      raise AttributeError(name)

    def call(*args, **options):
      self.calls.append((name, args, options))
      return types.SimpleNamespace(info=types.SimpleNamespace(run_id=options.get("run_id", "made")))

    return call
