-- Run by PostgreSQL on its first start.
CREATE DATABASE mlflow;
CREATE DATABASE prefect;
