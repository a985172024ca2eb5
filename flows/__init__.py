"""When, where and how often the stages run: Prefect flows over `dvc repro`. Start reading at pipeline.py."""
