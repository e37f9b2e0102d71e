# One image for every process of a deployment: the notifier, beat, Flower, the services, and the `knell` command.

FROM python:3.13-slim AS build
WORKDIR /build
COPY pyproject.toml constraints.txt README.md LICENSE ./
COPY src src
RUN pip wheel --quiet --no-deps --wheel-dir wheels . \
 && python -m venv /opt/knell \
 && /opt/knell/bin/pip install --quiet --no-cache-dir -c constraints.txt "$(ls wheels/knell-*.whl)[services,flower,postgresql]" \
 && /opt/knell/bin/pip uninstall --quiet --yes pip

FROM python:3.13-slim
# A fixed number, so that volumes keep their owner from one image to the next.
RUN useradd --system --uid 10001 --user-group --no-create-home --shell /usr/sbin/nologin knell \
 && install -d -o knell -g knell -m 0700 /keys/private \
 && install -d -o knell -g knell -m 0755 /keys/trust
COPY --from=build /opt/knell /opt/knell
ENV PATH=/opt/knell/bin:$PATH PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1
WORKDIR /srv/knell
COPY celeryconfig.py flowerconfig.py ./
COPY tasks tasks
COPY services services
USER knell
CMD ["knell", "--help"]
