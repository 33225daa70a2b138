/* As nvinfer.c, for libnvinfer_plugin. */
_Bool initLibNvInferPlugins(void *logger, const char *name) { return 0; }
