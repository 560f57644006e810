# The verbs people type. Everything runs in .venv, made here from the versions in constraints.txt.
PYTHON ?= python3
RUN := .venv/bin

.PHONY: demo test style bench bench-gpu results clean

# Erase "airplane" from the demo model, and the same without a mask as the control; then measure both.
demo: .venv/installed
	$(RUN)/accelerate launch erase_concept.py --pretrained_model_name_or_path demo --concept airplane
	$(RUN)/accelerate launch erase_concept.py --pretrained_model_name_or_path demo --concept airplane \
		--mask none --output_dir runs/airplane/no-mask
	$(RUN)/python -m eval accuracy --pretrained_model_name_or_path demo --concept airplane \
		--erasure runs/airplane runs/airplane/no-mask --output_dir runs/airplane \
		--num_forget_images 120 --num_retain_images 96
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

# The same on a CUDA card, at 512 pixels, batch 8 and 1. To try the commands where there is none, on tiny networks:
# make bench-gpu GPU="--device cpu --tiny --resolution 32 --steps 2 --scores 1000"
GPU := --device cuda
AT_512 := --dtype bf16 --resolution 512 --gradient_checkpointing
bench-gpu: .venv/installed
	$(RUN)/python -m benchmarks $(AT_512) --batch_size 8 --only reference_step our_step mask delta memory i2p $(GPU)
	$(RUN)/python -m benchmarks $(AT_512) --batch_size 1 --part batch-1 --only reference_step our_step $(GPU)

# The tables and pictures of the documents, from erasures trained and measured anew (about ten minutes a concept). What
# runs/results holds already is not made again. A model that `python -m demo.train --without CONCEPT --output_dir
# runs/without-CONCEPT` has made gets a row of its own.
CONCEPTS := airplane cat ink
retrained = $(if $(wildcard runs/without-$1/model_index.json),--retrained runs/without-$1)
MEASURED := $(CONCEPTS:%=runs/results/%) $(CONCEPTS:%=runs/results/%/composition)
DEEPER := neighbours attack relearn
attack := --num_prompts 24 --attack concept_inversion soft_prompt unlearndiffatk ring_a_bell tina noise_probe

results: $(MEASURED:%=%/results.json) $(DEEPER:%=runs/results/airplane/%/results.json) runs/classification/digits/results.json
	mkdir -p docs/results
	$(foreach concept,$(CONCEPTS),cp runs/results/$(concept)/results.json docs/results/$(concept).json;)
	$(foreach concept,$(CONCEPTS),cp runs/results/$(concept)/composition/results.json docs/results/$(concept)-composition.json;)
	$(RUN)/python -m eval compare docs/results/airplane.json --output_dir runs/compared/accuracy --into README.md
	$(RUN)/python -m eval compare $(CONCEPTS:%=docs/results/%.json) $(CONCEPTS:%=docs/results/%-composition.json) \
		--output_dir runs/compared/all --into docs/evaluation.md
	$(foreach measure,$(DEEPER),cp runs/results/airplane/$(measure)/results.json docs/results/airplane-$(measure).json;)
	$(RUN)/python -m eval compare $(DEEPER:%=docs/results/airplane-%.json) --output_dir runs/compared/deeper \
		--into docs/exact.md
	$(RUN)/python -m eval compare $(MEASURED) --output_dir runs/compared/pictures
	$(RUN)/python -m eval report runs/results/airplane
	cp runs/results/airplane/before-after.png docs/airplane.png
	cp runs/compared/pictures/grid.png docs/grid.png
	cp runs/classification/digits/results.json docs/results/digits.json
	$(RUN)/python -m classification table --results docs/results/digits.json --into docs/classification.md
	cp runs/classification/digits/gap-time.png docs/digits.png

runs/results/%/results.json: | .venv/installed
	$(RUN)/accelerate launch erase_concept.py --pretrained_model_name_or_path demo --concept $* \
		--output_dir runs/results/$*
	$(RUN)/accelerate launch erase_concept.py --pretrained_model_name_or_path demo --concept $* \
		--mask none --output_dir runs/results/$*-no-mask
	$(RUN)/python -m eval accuracy --pretrained_model_name_or_path demo --concept $* \
		--erasure runs/results/$* runs/results/$*-no-mask --output_dir runs/results/$* $(call retrained,$*)

runs/classification/digits/results.json: | .venv/installed
	$(RUN)/python -m classification run --output_dir runs/classification/digits

runs/results/%/composition/results.json: runs/results/%/results.json
	$(RUN)/python -m eval composition --pretrained_model_name_or_path demo --concept $* \
		--erasure runs/results/$* runs/results/$*-no-mask --output_dir runs/results/$*/composition $(call retrained,$*)

$(DEEPER:%=runs/results/airplane/%/results.json): runs/results/airplane/%/results.json: runs/results/airplane/results.json
	$(RUN)/python -m eval $* --pretrained_model_name_or_path demo --concept airplane \
		--erasure runs/results/airplane runs/results/airplane-no-mask --output_dir runs/results/airplane/$* \
		$(call retrained,airplane) $($*)

clean:
	rm -rf .venv runs build dist *.egg-info

.venv/installed: setup.cfg constraints.txt
	$(PYTHON) -m venv .venv
	$(RUN)/pip install --quiet --constraint constraints.txt --editable '.[classification,data,eval,export,test]'
	touch $@
