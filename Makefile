# The verbs people type. Everything runs in .venv, made here from the versions in constraints.txt.
PYTHON ?= python3
RUN := .venv/bin

.PHONY: demo test style bench results clean

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

# Speed and memory against the published recipe; needs 20 GB of memory and about ten minutes.
bench: .venv/installed
	$(RUN)/python -m benchmarks

# The README's table and picture. Delete a file of docs/results to have it measured again (about four minutes each).
results: docs/results/airplane.json docs/results/cat.json docs/results/ink.json
	$(RUN)/python -m eval table $^ --into README.md
	cp runs/results/airplane/before-after.png docs/airplane.png

docs/results/%.json: | .venv/installed
	mkdir -p docs/results
	$(RUN)/accelerate launch erase_concept.py --pretrained_model_name_or_path demo --concept $* \
		--output_dir runs/results/$*
	$(RUN)/accelerate launch erase_concept.py --pretrained_model_name_or_path demo --concept $* \
		--density 1 --output_dir runs/results/$*-no-mask
	$(RUN)/python -m eval accuracy --pretrained_model_name_or_path demo --concept $* \
		--erasure runs/results/$* runs/results/$*-no-mask --output_dir runs/results/$*
	$(RUN)/python -m eval report runs/results/$*
	cp runs/results/$*/results.json $@

clean:
	rm -rf .venv runs build dist *.egg-info

.venv/installed: setup.cfg constraints.txt
	$(PYTHON) -m venv .venv
	$(RUN)/pip install --quiet --constraint constraints.txt --editable '.[data,eval,test]'
	touch $@
