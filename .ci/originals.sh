# Sourced by .ci/run: installs the packages that the front ends are compared with, and says where they are.
#
# Nothing goes into the environment of the tests: each package has a folder of its own under build/originals, because
# their versions exclude each other and ours, and only the processes that the tests start for them look there.

# install_original FOLDER IMPORT PACKAGE...: the packages without what they ask for; IMPORT must work from there.
install_original() {
  local folder="build/originals/$1" import="$2"
  if [ ! -d "$folder" ]; then
    .venv/bin/pip install -q --no-deps --retries 1 --timeout 20 --target "$folder.new" "${@:3}" || return
    mv "$folder.new" "$folder"
  fi
  [ -z "$import" ] || PYTHONPATH="$folder:build/originals/nni-imports" .venv/bin/python -c "import $import" > /dev/null 2>&1
}

install_nni() {
  install_original nni-imports "" absl-py astor certifi charset-normalizer cloudpickle colorama contextlib2 filelock future \
    idna json-tricks prettytable psutil PythonWebHDFS pyyaml requests responses schema simplejson tensorboard tqdm \
    'typeguard<4.1.3' typing_extensions urllib3 wcwidth websockets grpcio markdown markupsafe packaging protobuf \
    'setuptools<81' six tensorboard-data-server werkzeug || return
  install_original nni-3 nni.compression nni==3.0 || return
  install_original nni-2 nni.algorithms.compression.pytorch.quantization nni==2.10.1 || return
  export QKERNELS_NNI_PATH="$PWD/build/originals/nni-3:$PWD/build/originals/nni-imports"
  export QKERNELS_NNI2_PATH="$PWD/build/originals/nni-2:$PWD/build/originals/nni-imports"
}

install_aimet() {
  install_original aimet "" aimet_torch==2.42.0 attrs bokeh cloudpickle colorcet contourpy holoviews hvplot jinja2 jsonschema \
    jsonschema_specifications markupsafe ml_dtypes narwhals onnx onnx_ir onnxscript packaging pandas panel param protobuf psutil \
    python_dateutil pytz pyviz_comms pyyaml referencing rpds_py six tornado tqdm tzdata xyzservices || return
  PYTHONPATH=build/originals/aimet .venv/bin/python -c "from aimet_torch import batch_norm_fold, quantsim" || return
  export QKERNELS_AIMET_PATH="$PWD/build/originals/aimet"
}
