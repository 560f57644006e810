# The verbs people type. Everything runs in .venv, made here from the versions in constraints.txt.
PYTHON ?= python3
RUN := .venv/bin

.PHONY: demo test style clean

# Erase "airplane" from the demo model, and the same without a mask as the control; then measure both.
demo: .venv/installed
	$(RUN)/accelerate launch erase_concept.py --pretrained_model_name_or_path demo --concept airplane
	$(RUN)/accelerate launch erase_concept.py --pretrained_model_name_or_path demo --concept airplane \
		--density 1 --output_dir runs/airplane/no-mask
	$(RUN)/python -m eval accuracy --pretrained_model_name_or_path demo --concept airplane \
		--erasure runs/airplane runs/airplane/no-mask --output_dir runs/airplane \
		--num_forget_images 204 --num_retain_images 144
	$(RUN)/python -m eval report runs/airplane
	@echo "Open runs/airplane/report.html"

test: .venv/installed
	$(RUN)/python -m pytest

style: .venv/installed
	$(RUN)/ruff check .
	$(RUN)/ruff format --check .

clean:
	rm -rf .venv runs build dist *.egg-info

.venv/installed: setup.cfg constraints.txt
	$(PYTHON) -m venv .venv
	$(RUN)/pip install --quiet --constraint constraints.txt --editable '.[eval,test]'
	touch $@
